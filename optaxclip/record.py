"""What a clip did: the record that it keeps in its state, and how to read it out of any optimizer's state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.base import Metrics, Norms


class Step(NamedTuple):
    """What one update did, each in the shape of the norms; None where it was not measured.

    Attributes:
      norms: of the blocks.
      bounds: that they were held against.
      factors: that they were multiplied by.
      over: 1 where a norm was over its bound, else 0; of elements the share.
      bad: whether a block counted as not finite.
    """

    norms: Norms
    bounds: Norms
    factors: Norms
    over: Norms
    bad: Norms


def pack_names(names: Sequence[str]) -> dict[str, Any]:
    """Names as the keys of nested dicts that hold nothing, one branch a block, in order.

    So they ride along in every state and checkpoint without an array, and without a node type of our own that a
    serializer would have to know. Paths are nested, since a key with "/" does not survive `flatten_dict(sep="/")`;
    each begins with a number, since two blocks may have one path.
    """
    digits = len(str(len(names)))

    def branch(parts):
        return {parts[0]: branch(parts[1:]) if len(parts) > 1 else None}

    return {f"{i:0{digits}}": branch(name.split("/")) for i, name in enumerate(names)}


def unpack_names(blocks: Any) -> tuple[str, ...]:
    """The reverse of `pack_names`."""

    def path(branch):
        ((key, below),) = branch.items()
        return key if below is None else f"{key}/{path(below)}"

    return tuple(path(blocks[key]) for key in sorted(blocks))


def fresh_metrics(norms: Norms, blocks: Any, *, measured: bool = True) -> Metrics:
    """The record before the first update. Each field has a buffer of its own, so that states can be donated."""
    leaves = jax.tree.leaves(norms)
    shape = norms.shape if hasattr(norms, "shape") else ()
    dtype = leaves[0].dtype if leaves else jnp.float32

    def zeros(dtype):
        return jnp.zeros(shape, dtype) if measured else None

    return Metrics(
        grad_norm=zeros(dtype),
        clip_bound=jnp.zeros(shape, dtype),  # not infinity, which `jax.debug_infs` takes for an overflow
        clip_factor=jnp.ones(shape, dtype) if measured else None,
        clipped_share=zeros(dtype),
        clipped_steps=zeros(jnp.int32),
        nonfinite_steps=zeros(jnp.int32),
        total_steps=jnp.zeros((), jnp.int32),
        blocks=blocks,
    )


@jax.jit(inline=True)
def record(old: Metrics, step: Step) -> Metrics:
    """The record after one more update."""
    if isinstance(step.bounds, list):
        step = _extremes(step)
    if step.norms is None:
        return old._replace(clip_bound=step.bounds.astype(old.clip_bound.dtype), total_steps=_count(old.total_steps, True))
    return Metrics(
        grad_norm=step.norms.astype(old.grad_norm.dtype),
        clip_bound=step.bounds.astype(old.clip_bound.dtype),
        clip_factor=step.factors.astype(old.clip_factor.dtype),
        clipped_share=step.over.astype(old.clipped_share.dtype),
        clipped_steps=_count(old.clipped_steps, (step.over > 0) & ~step.bad),
        nonfinite_steps=_count(old.nonfinite_steps, step.bad),
        total_steps=_count(old.total_steps, True),
        blocks=old.blocks,
    )


def _count(count: jax.Array, one_more) -> jax.Array:
    """One more where `one_more`, up to the largest int32."""
    return jnp.where(one_more, optax.safe_increment(count), count)


def _extremes(step: Step) -> Step:
    """Arrays of units as scalars. The largest norm is NaN if any is."""
    units = sum(n.size for n in step.norms)
    if not units:
        zero = jnp.zeros(())
        return Step(zero, jnp.full((), jnp.inf), jnp.ones(()), zero, jnp.zeros((), bool))

    def meet(reduce, arrays):
        return reduce(jnp.stack([reduce(x) for x in arrays if x.size]))

    over = meet(jnp.sum, step.over) / units
    return Step(
        meet(jnp.max, step.norms), meet(jnp.min, step.bounds), meet(jnp.min, step.factors), over, meet(jnp.any, step.bad)
    )


def _is_variable(x: Any) -> bool:
    return hasattr(type(x), "get_metadata") or hasattr(x, "raw_value")


def to_arrays(tree: Any) -> Any:
    """A tree of arrays, out of the variables that Flax's `nnx.Optimizer` wraps them in."""
    return jax.tree.map(lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable)


def find_nodes(opt_state: Any, *kinds: type) -> list:
    """All nodes of these kinds in a state, in its order, as plain arrays; the inside of one is not searched."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [to_arrays(x) for x in nodes if isinstance(x, kinds)]


# For each key of `metrics` the field, and what stands for all of several blocks.
_KEYS: dict[str, tuple[Callable[[Metrics], Any], Callable[..., Any]]] = {
    "grad_norm": (lambda m: m.grad_norm, jnp.max),
    "bound": (lambda m: m.clip_bound, jnp.min),
    "factor": (lambda m: m.clip_factor, jnp.min),
    "clipped": (lambda m: m.clipped_share, jnp.mean),
    "clipped_fraction": (lambda m: None if m.clipped_steps is None else _fraction(m), jnp.mean),
    "nonfinite_steps": (lambda m: m.nonfinite_steps, jnp.max),
}


def _fraction(m: Metrics) -> jax.Array:
    total = jnp.maximum(m.total_steps, 1)
    return m.clipped_steps / total.reshape(total.shape + (1,) * (jnp.ndim(m.clipped_steps) - total.ndim))


def scalars_of(m: Metrics, prefix: str) -> dict[str, jax.Array]:
    """The record of one clip as a flat dict of scalars; of a batch of runs, of arrays with the batch's shape."""
    names = unpack_names(m.blocks)
    out = {prefix + "steps": m.total_steps}
    for key, (read, reduce) in _KEYS.items():
        value = read(m)
        if value is None:
            continue
        out[prefix + key] = reduce(value, axis=-1) if names else value
        out |= {f"{prefix}{key}/{name}": value[..., i] for i, name in enumerate(names)}
    return out


def number_keys(found: list, read: Callable[[Any, str], dict], prefix: str) -> dict[str, jax.Array]:
    """The scalars of all that was found; where that is more than one, with a number behind the prefix."""
    if len(found) == 1:
        return read(found[0], prefix)
    return {key: value for i, x in enumerate(found) for key, value in read(x, f"{prefix}{i}/").items()}
