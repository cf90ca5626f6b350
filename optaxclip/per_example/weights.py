"""Norms of the gradients of examples, and sums of them by weight.

A list of arrays holds the gradients: one array a parameter, with a leading axis that numbers the examples.
"""

import jax
import jax.numpy as jnp

from optaxclip.actions import rescale
from optaxclip.measure import measure
from optaxclip.mesh import Span
from optaxclip.norms import l2, widen
from optaxclip.scopes import units


def example_norms(arrays: list[jax.Array]) -> jax.Array:
    """The norm of each example over all arrays, a vector: the norm of the vector of its norms in the arrays."""
    nowhere = Span((frozenset(),) * len(arrays), (), False)
    shapes = [x.shape for x in arrays]
    by_leaf = measure(l2, arrays, units(..., batch_axes=1).cut([""] * len(arrays), shapes), nowhere).norms
    stacked = jnp.stack([n.ravel() for n in by_leaf], axis=1)
    own = Span((frozenset(),), (), False)
    return measure(l2, [stacked], units(..., batch_axes=1).cut([""], [stacked.shape]), own).norms[0].ravel()


def clip_weights(norms: jax.Array, bound: jax.typing.ArrayLike) -> jax.Array:
    """min(1, bound / norm); 0 for an example that is not finite. A negative bound counts as 0."""
    finite = jnp.isfinite(norms)
    bounds = jnp.broadcast_to(jnp.asarray(bound).astype(norms.dtype), norms.shape)
    return jnp.where(finite, rescale(jnp.where(finite, norms, 0), jnp.maximum(bounds, 0)), 0)


def normal_weights(norms: jax.Array, bound: jax.typing.ArrayLike, gamma: jax.typing.ArrayLike) -> jax.Array:
    """The bound by (norm + γ); 0 for an example that is not finite, or all zeros. A negative bound counts as 0."""
    some = jnp.isfinite(norms) & (norms > 0)
    longer = norms + jnp.asarray(gamma).astype(norms.dtype)
    return jnp.where(some, jnp.maximum(jnp.asarray(bound).astype(norms.dtype), 0) / jnp.where(some, longer, 1), 0)


def per_example(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights in a shape that multiplies `x`, example by example."""
    return weights.reshape(weights.shape + (1,) * (x.ndim - 1))


def counted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x` with zeros for the examples of weight 0, whatever is in them."""
    return jnp.where(per_example(weights, x) == 0, jnp.zeros_like(x), x)


def weighted_sum(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Σᵢ weightsᵢ · xᵢ in float32 at least; an example of weight 0 adds nothing, whatever is in it."""
    wide = widen(x)
    weights = weights.astype(wide.dtype)
    return jnp.tensordot(weights, counted(wide, weights), axes=1, precision=jax.lax.Precision.HIGHEST)
