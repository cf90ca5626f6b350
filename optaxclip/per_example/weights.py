"""Norms and weighted sums of the gradients of examples.

Gradients are a list of arrays, one per parameter, with a leading axis that numbers the examples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from optaxclip import scopes, xla
from optaxclip.base import Action
from optaxclip.norms import l2

_EXAMPLES = scopes.units(..., batch_axes=1)
_LIFT = 2.0**80


def example_norms(arrays: Sequence[jax.Array], paths: Sequence[str]) -> jax.Array:
    """Computes the norm of each example over all arrays (at least one), in float32 at least."""
    return block_norms(arrays, paths, [0] * len(arrays), 1)[:, 0]


def block_norms(
    arrays: Sequence[jax.Array], paths: Sequence[str], index: Sequence[int], count: int
) -> jax.Array:
    """Computes the norm of each example over the arrays of each block, (B, K); 0 if it has none.

    Args:
      arrays, paths: at least one array.
      index: the block of each array.
      count: K.
    """
    measure = functools.partial(_norms, paths=paths, index=index, count=count)
    lifted = functools.partial(_tiny_norms, index=index, count=count)
    return xla.measure_small(measure, lifted, arrays)


def _by_block(each: Sequence[jax.Array], index: Sequence[int], count: int) -> list[list[jax.Array]]:
    """Groups one value per array, (B,), into a list per block; zeros for one without arrays."""
    places = list(zip(each, index, strict=True))
    return [
        [x for x, k in places if k == block] or [jnp.zeros_like(each[0])] for block in range(count)
    ]


def _tiny_norms(arrays: Sequence[jax.Array], index: Sequence[int], count: int) -> jax.Array:
    """Computes norms of at most 1e-10, which cannot overflow when they are scaled up."""

    def pool(x):
        lifted = xla.times(xla.widen(x), jnp.float32(_LIFT))
        return jnp.sum(l2.lift(lifted), axis=tuple(range(1, x.ndim)), dtype=xla.accumulator(arrays))

    blocks = _by_block(list(map(pool, arrays)), index, count)
    return jnp.sqrt(jnp.stack([sum(own) for own in blocks], axis=1)) / _LIFT


def _norms(
    arrays: Sequence[jax.Array], paths: Sequence[str], index: Sequence[int], count: int
) -> jax.Array:
    """Combines the norms of the arrays of each block, by example."""
    blocks = _by_block(_measure(arrays, paths), index, count)
    several = [jnp.stack(own, axis=1) for own in blocks if len(own) > 1]
    # All blocks in one call, because each call compiles its own branches.
    joined = iter(_measure(several, [""] * len(several)))
    return jnp.stack([next(joined) if len(own) > 1 else own[0] for own in blocks], axis=1)


def _measure(arrays: Sequence[jax.Array], paths: Sequence[str]) -> list[jax.Array]:
    """Computes the norm of each example in each array, (B,)."""
    if not arrays:
        return []
    shapes = [x.shape for x in arrays]
    layout = xla.lay_out(_EXAMPLES.cut(paths, shapes), paths, shapes)
    rows = xla.measure(l2, list(arrays), layout)
    norms = [norm for row in rows for norm in row.reshape(row.shape[0], -1)]
    order = [i for some in layout.arrays for row in some for i in layout.rows[row]]
    found = dict(zip(order, norms, strict=True))
    return [found[i] for i in range(len(arrays))]


def weigh(action: Action, norms: jax.Array, bounds: ArrayLike) -> jax.Array:
    """Computes the factors of an action; 0 for norms not finite. A negative bound counts as 0."""
    finite = jnp.isfinite(norms)
    bounds = jnp.broadcast_to(jnp.asarray(bounds).astype(norms.dtype), norms.shape)
    # Actions never see NaN: their derivative would be NaN even if the factor itself is replaced.
    factors = action(jnp.where(finite, norms, 0), jnp.maximum(bounds, 0))
    return jnp.where(finite, factors.astype(norms.dtype), 0)


def weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes Σᵢ weightsᵢ · xᵢ in float32 at least, ignoring examples of weight 0."""
    wide = xla.widen(x)
    weights = weights.astype(wide.dtype)
    (over, *rest) = jax.typeof(wide).sharding.spec
    return jnp.tensordot(
        weights,
        xla.drop_unweighted(wide, weights),
        axes=1,
        precision=lax.Precision.HIGHEST,
        # If the type of an array says that examples are spread (on an explicit mesh), a dot over
        # them needs the sharding of its result. A product and a sum do not, but take 9 times as
        # long on a CPU.
        out_sharding=None if over is None else PartitionSpec(*rest),
    )
