"""What a clip did: the record that it keeps in its state, and how to read it out of any optimizer's state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.leaves import pack
from optaxclip.mesh import alone
from optaxclip.watching.state import WatchState, scalars_of


class Metrics(NamedTuple):
    """What the last update did, and how often.

    Each field but the last two has the shape of the norms: a scalar for `tree`, one entry a block for `leaf` and
    `groups`.  For `units`, whose blocks may be as many as a layer is wide, they are scalars: the extremes over all
    units (largest norm, smallest bound, smallest factor), the share of units clipped, and the steps on which any was.

    Attributes:
      grad_norm: the norm before the clip, float32 (float64 for float64 leaves).
      clip_bound: the bound that it was held against.
      clip_factor: what the block was multiplied by.
      clipped_share: 1 if the norm was over the bound, else 0; for units and elements, the share of them.
      clipped_steps: int32, the steps on which the norm was over the bound.
      nonfinite_steps: int32, the steps on which the norm was NaN or infinite.
      total_steps: int32 scalar, all steps.
      blocks: the names of the blocks, as the keys of a dict of Nones: they ride along in every state and checkpoint
        without an array, or a node type of our own that a serializer would have to know.
    """

    grad_norm: Any
    clip_bound: Any
    clip_factor: Any
    clipped_share: Any
    clipped_steps: Any
    nonfinite_steps: Any
    total_steps: Any
    blocks: dict[str, None]


class Step(NamedTuple):
    """What one update did: one entry a block, a scalar, a vector, or a list of arrays."""

    norms: Any
    bounds: Any
    factors: Any
    clipped: Any


def named_blocks(params: Any, names: tuple[str, ...], named: bool) -> Any:
    """What goes into `Metrics.blocks`.

    `optax.tree.map_params` calls `init` with a placeholder for the parameters, an empty node of its own, and lays the
    state that it gets over the real one. Of a scope that names its blocks the names are unknown then; a leaf stands for
    them, which fits over any dict.

    Args:
      params: what `init` was called with.
      names: the names of the blocks.
      named: whether the scope names its blocks.
    """
    placeholder = not jax.tree.leaves(params) and not isinstance(params, dict | list | tuple | type(None))
    return 0 if named and placeholder else dict.fromkeys(sorted(names))


def fresh_metrics(norms: Any, blocks: Any) -> Metrics:
    """The record before the first update. Each field has a buffer of its own, so that states can be donated."""
    leaves = jax.tree.leaves(norms)
    shape = norms.shape if isinstance(norms, jax.Array) else ()
    dtype = leaves[0].dtype if leaves else jnp.float32
    return Metrics(
        grad_norm=jnp.zeros(shape, dtype),
        clip_bound=jnp.full(shape, jnp.inf, dtype),
        clip_factor=jnp.ones(shape, dtype),
        clipped_share=jnp.zeros(shape, dtype),
        clipped_steps=jnp.zeros(shape, jnp.int32),
        nonfinite_steps=jnp.zeros(shape, jnp.int32),
        total_steps=jnp.zeros((), jnp.int32),
        blocks=blocks,
    )


@functools.partial(jax.jit, inline=True)
def recorded(old: Metrics, step: Step) -> Metrics:
    """The record after one more update."""
    if not isinstance(step.norms, jax.Array):
        step = _extremes(step)
    bad = ~jnp.isfinite(step.norms)
    return Metrics(
        grad_norm=step.norms.astype(old.grad_norm.dtype),
        clip_bound=step.bounds.astype(old.clip_bound.dtype),
        clip_factor=step.factors.astype(old.clip_factor.dtype),
        clipped_share=step.clipped.astype(old.clipped_share.dtype),
        clipped_steps=_counted(old.clipped_steps, (step.clipped > 0) & ~bad),
        nonfinite_steps=_counted(old.nonfinite_steps, bad),
        total_steps=_counted(old.total_steps, True),
        blocks=old.blocks,
    )


def _counted(count: jax.Array, one_more) -> jax.Array:
    """One more where `one_more`, up to the largest int32."""
    return jnp.where(one_more, optax.safe_increment(count), count)


def _extremes(step: Step) -> Step:
    """Lists of units as scalars. The largest norm is NaN if any is."""
    units = sum(n.size for n in step.norms)
    if not units:
        return Step(jnp.zeros(()), jnp.full((), jnp.inf), jnp.ones(()), jnp.zeros(()))
    if alone():
        norms, bounds, factors, over = ([pack(part)] for part in step)
    else:
        norms, bounds, factors, over = ([x for x in part if x.size] for part in step)
    return Step(
        jnp.max(jnp.stack([jnp.max(x) for x in norms])),
        jnp.min(jnp.stack([jnp.min(x) for x in bounds])),
        jnp.min(jnp.stack([jnp.min(x) for x in factors])),
        jnp.sum(jnp.stack([jnp.sum(x) for x in over])) / units,
    )


def _is_variable(x) -> bool:
    return hasattr(type(x), "get_metadata") or hasattr(x, "raw_value")


def plain(tree: Any) -> Any:
    """A tree of arrays, out of the variables that Flax's `nnx.Optimizer` wraps them in."""
    return jax.tree.map(lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable)


def found_in(opt_state: Any, *kinds: type) -> list:
    """All nodes of these kinds in a state, in its order, as plain arrays; the inside of one is not searched."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [plain(x) for x in nodes if isinstance(x, kinds)]


def _of_one(m: Metrics, prefix: str) -> dict[str, jax.Array]:
    names = sorted(m.blocks)
    fields = {
        "grad_norm": (m.grad_norm, jnp.max),
        "bound": (m.clip_bound, jnp.min),
        "factor": (m.clip_factor, jnp.min),
        "clipped": (m.clipped_share, jnp.mean),
        "clipped_fraction": (m.clipped_steps / jnp.maximum(m.total_steps, 1), jnp.mean),
        "nonfinite_steps": (m.nonfinite_steps, jnp.max),
    }
    out = {prefix + "steps": m.total_steps}
    for key, (value, reduce) in fields.items():
        out[prefix + key] = reduce(value, axis=-1) if names else value
        out |= {f"{prefix}{key}/{name}": value[..., i] for i, name in enumerate(names)}
    return out


def metrics(opt_state: Any, prefix: str = "clip/", watch_prefix: str = "watch/") -> dict[str, jax.Array]:
    """What the clips and watches in an optimizer's state saw and did, as a flat dict of scalars that any logger takes.

    Finds every clip, however deep: in `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams`,
    `apply_if_finite`, a Flax `nnx.Optimizer` (pass `optimizer.opt_state`) or a linen `TrainState`.  Safe under `jit`;
    reading it forces nothing to the host until you look, so log every few steps, not every one.

    Args:
      opt_state: the state of an optimizer, or anything that holds one.
      prefix: what all keys of clips start with.
      watch_prefix: what all keys of `optaxclip.watch` start with.

    Returns:
      A dict with the keys `grad_norm` (before the clip), `bound`, `factor`, `clipped` (1 if clipped at this step, else
      0; with many blocks, the share of them), `clipped_fraction` (of all steps), `nonfinite_steps` and `steps`.  With
      several named blocks these are the largest norm, the smallest bound, the smallest factor, the mean shares and the
      largest count, and each but `steps` occurs again as `grad_norm/<block>` and so on.  With several clips, the keys
      start with `clip/0/`, `clip/1/`, in the order of the state.

      Of a watch: `grad_norm` and `grad_norm/<block>`, `median_ratio`, `top_block/0` (an index into the sorted names of
      blocks) with `top_share/0` and so on, `quantile/0.5`, `would_clip/<candidate>`, `nonfinite_steps`, of the last of
      them `nonfinite_step` and `nonfinite_block`, `bad_steps` and `steps`.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> seen = optaxclip.metrics(state)
    >>> float(seen["clip/grad_norm"]), float(seen["clip/bound"]), float(seen["clip/clipped"])
    (5.0, 1.0, 1.0)
    """
    clips, watches = found_in(opt_state, Metrics), found_in(opt_state, WatchState)
    return _numbered(clips, _of_one, prefix) | _numbered(watches, scalars_of, watch_prefix)


def _numbered(found: list, read: Callable[[Any, str], dict], prefix: str) -> dict[str, jax.Array]:
    """The scalars of all that was found; where that is more than one, with a number behind the prefix."""
    if len(found) == 1:
        return read(found[0], prefix)
    return {key: value for i, x in enumerate(found) for key, value in read(x, f"{prefix}{i}/").items()}
