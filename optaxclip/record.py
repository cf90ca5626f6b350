"""What a clip did: the record in its state, and how to find it in the state of any optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import xla
from optaxclip.base import Metrics, Norms
from optaxclip.trees import is_variable, unpack_names


class Step(NamedTuple):
    """What one update did. Each field has the shape of the norms, or is None if not measured.

    Attributes:
      norms: of the blocks.
      bounds: what the norms were compared with.
      factors: what the blocks were multiplied by.
      over: 1 where a norm was over its bound, else 0; for value clipping the share of elements.
      bad: whether a block counted as not finite.
    """

    norms: Norms
    bounds: Norms
    factors: Norms
    over: Norms
    bad: Norms


def fresh_metrics(norms: Norms, blocks: Any, *, measured: bool, bounded: bool) -> Metrics:
    """The record before the first update. No two fields share a buffer: it may be donated."""

    def fill(value, dtype=None):
        return jax.tree.map(lambda n: xla.fill_like(n, value, dtype), norms)

    return Metrics(
        grad_norm=fill(0) if measured else None,
        # Not infinity, which `jax.debug_infs` would report as an overflow.
        clip_bound=fill(0) if bounded else None,
        clip_factor=fill(1) if measured else None,
        clipped_share=fill(0) if measured else None,
        clipped_steps=fill(0, jnp.int32) if measured else None,
        nonfinite_steps=fill(0, jnp.int32) if measured else None,
        total_steps=jnp.zeros((), jnp.int32),
        blocks=blocks,
    )


# Jitted, so that an update without `jit` dispatches one program instead of a dozen. With `inline`
# nothing of this shows in a program of the user's.
@functools.partial(jax.jit, inline=True)
def record(old: Metrics, step: Step) -> Metrics:
    """The record after one more update.

    Fields of units are not reduced here but when they are read: on a mesh each maximum, minimum and
    mean would be a collective at every step.
    """
    # A user's threshold may return wider bounds, and a constant one does not vary over devices as
    # norms of units do, but the types of a state must not change.
    seen = jax.tree.map(lambda new, old: xla.vary_as(new.astype(old.dtype), old), step[:4], old[:4])
    # An infinite norm exceeds every bound, but was not clipped: it only counts as not finite.
    clipped = jax.tree.map(lambda over, bad: over.astype(bool) & ~bad, step.over, step.bad)
    # At the largest int32 all counters stop: none is ahead of that of the steps.
    more = old.total_steps < jnp.iinfo(jnp.int32).max

    def count(counter, happened):
        return counter + (happened & more).astype(counter.dtype)

    return Metrics(
        *seen,
        clipped_steps=jax.tree.map(count, old.clipped_steps, clipped),
        nonfinite_steps=jax.tree.map(count, old.nonfinite_steps, step.bad),
        total_steps=count(old.total_steps, True),
        blocks=old.blocks,
    )


def find_nodes(opt_state: Any, *kinds: type) -> list:
    """All nodes of these types in a state, in order, as plain arrays; not those inside another."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [_to_arrays(x) for x in nodes if isinstance(x, kinds)]


def _to_arrays(tree: Any) -> Any:
    """Unwraps the variables in which Flax's `nnx.Optimizer` holds the arrays of a state."""
    return jax.tree.map(lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable)


# For each key of `metrics` the field, and how the values of several blocks become one.
_KEYS: dict[str, tuple[str, Callable[..., Any]]] = {
    "grad_norm": ("grad_norm", xla.largest),
    "bound": ("clip_bound", xla.smallest),
    "factor": ("clip_factor", xla.smallest),
    "clipped": ("clipped_share", jnp.mean),
    "clipped_fraction": ("clipped_steps", jnp.mean),
    "nonfinite_steps": ("nonfinite_steps", jnp.max),
}


def scalars_of(m: Metrics, prefix: str) -> dict[str, jax.Array]:
    """The record of one clip as a flat dict of scalars, each with the shape of a batch of runs."""
    # There is one step counter per run, so its rank is that of the batch of runs under `vmap`.
    names, batch = unpack_names(m.blocks), jnp.ndim(m.total_steps)
    total = jnp.maximum(m.total_steps, 1)
    out = {prefix + "steps": m.total_steps}
    for key, (field, reduce) in _KEYS.items():
        value = getattr(m, field)
        if value is None:
            continue
        arrays = [value]
        if isinstance(value, list | tuple):
            arrays = [x for x in value if x.size] or [jnp.zeros(())]
        # A tree without blocks: the maximum of nothing is undefined.
        if not arrays[0].size:
            continue
        if key == "clipped_fraction":
            arrays = [x / total.reshape(total.shape + (1,) * (x.ndim - batch)) for x in arrays]
        out[prefix + key] = _reduce_all(reduce, arrays, batch)
        # Parameters that are one bare array have the path "", and the key above says it all.
        if names != ("",):
            out |= {f"{prefix}{key}/{name}": arrays[0][..., i] for i, name in enumerate(names)}
    return out


def _reduce_all(reduce: Callable[..., Any], arrays: list[jax.Array], batch: int) -> jax.Array:
    """One value of all blocks, for each run of a batch."""
    # Not joined first: units lie on devices as their leaves do, and joining would gather them.
    each = [reduce(x, axis=tuple(range(batch, x.ndim))) for x in arrays]
    if len(each) == 1:
        return each[0]
    if reduce is jnp.mean:
        sizes = [math.prod(x.shape[batch:]) for x in arrays]
        each = [x * (n * len(sizes) / sum(sizes)) for x, n in zip(each, sizes, strict=True)]
    return reduce(jnp.stack(each), axis=0)


def number_keys(found: list, read: Callable[[Any, str], dict], prefix: str) -> dict[str, jax.Array]:
    """The scalars of everything found, numbered after the prefix if there are several."""
    if len(found) == 1:
        return read(found[0], prefix)
    return {
        key: value for i, x in enumerate(found) for key, value in read(x, f"{prefix}{i}/").items()
    }
