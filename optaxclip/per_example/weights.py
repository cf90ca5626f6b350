"""Norms of the gradients of examples, and their weighted sums.

Gradients are a list of arrays, one per parameter, with a leading axis that numbers the examples.
"""

from __future__ import annotations

import functools
import operator
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
# On a CPU, units count an array whose squares all underflow as zeros. Next to an array with a norm
# above this, that changes nothing.
_LOST = 1e-10
_LIFT = 2.0**80


def example_norms(arrays: Sequence[jax.Array], paths: Sequence[str]) -> jax.Array:
    """The norm of each example over all arrays (at least one array), in float32 at least."""

    def checked(arrays):
        norms = _norms(arrays, paths)
        # NaN counts as fine: at another scale it is NaN, too.
        fine = ~(norms <= _LOST)
        return lax.cond(
            jnp.all(fine), lambda: norms, lambda: jnp.where(fine, norms, _tiny_norms(arrays))
        )

    # On other platforms units are measured at two scales already, and a branch would make a GPU
    # wait for its host.
    return lax.platform_dependent(list(arrays), cpu=checked, default=lambda x: _norms(x, paths))


def _tiny_norms(arrays: Sequence[jax.Array]) -> jax.Array:
    """Norms of at most 1e-10, which cannot overflow when they are scaled up."""

    def pool(x):
        lifted = xla.times(xla.widen(x), jnp.float32(_LIFT))
        return jnp.sum(l2.lift(lifted), axis=tuple(range(1, x.ndim)), dtype=xla.accumulator(arrays))

    return jnp.sqrt(functools.reduce(operator.add, map(pool, arrays))) / _LIFT


def _norms(arrays: Sequence[jax.Array], paths: Sequence[str]) -> jax.Array:
    """The norm of the norms of each array, by example."""
    rows = xla.measure(l2, list(arrays), _lay_out(paths, [x.shape for x in arrays]))
    by_array = jnp.concatenate([row.reshape(row.shape[0], -1) for row in rows]).T
    return xla.measure(l2, [by_array], _lay_out([""], [by_array.shape]))[0].ravel()


def _lay_out(paths, shapes) -> xla.Layout:
    return xla.lay_out(_EXAMPLES.cut(paths, shapes), paths, shapes)


def weigh(action: Action, norms: jax.Array, bounds: ArrayLike) -> jax.Array:
    """The factors of an action; 0 for what is not finite. A negative bound counts as 0."""
    finite = jnp.isfinite(norms)
    bounds = jnp.broadcast_to(jnp.asarray(bounds).astype(norms.dtype), norms.shape)
    # Actions never see NaN: its derivative is NaN, even where the factor itself is replaced.
    factors = action(jnp.where(finite, norms, 0), jnp.maximum(bounds, 0))
    return jnp.where(finite, factors.astype(norms.dtype), 0)


def align(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights with as many axes as `x`, to multiply it example by example."""
    return weights.reshape(weights.shape + (1,) * (x.ndim - 1))


def drop_unweighted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x` with zeros for the examples of weight 0, since 0 · NaN is NaN."""
    return jnp.where(align(weights, x) == 0, jnp.zeros_like(x), x)


def weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Σᵢ weightsᵢ · xᵢ in float32 at least; what is in examples of weight 0 does not matter."""
    wide = xla.widen(x)
    weights = weights.astype(wide.dtype)
    (over, *rest) = jax.typeof(wide).sharding.spec
    return jnp.tensordot(
        weights,
        drop_unweighted(wide, weights),
        axes=1,
        precision=lax.Precision.HIGHEST,
        # Where the type of an array says that examples are spread (on an explicit mesh), a dot over
        # them has to be told how its result is. A product and a sum need not, but take 9 times as
        # long on a CPU.
        out_sharding=None if over is None else PartitionSpec(*rest),
    )
