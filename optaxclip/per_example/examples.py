"""What becomes of the examples of a batch: their clip, and the report of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.per_example.ghost import Backward
from optaxclip.per_example.weights import clip_weights, normalizing_weights
from optaxclip.xla import widen


class ClippedExamples(NamedTuple):
    """What happened to the examples of a batch.

    Attributes:
      losses: the loss of each example.
      norms: the norm of the gradient of each example, before the clip, in float32 at least; NaN
        where it is not finite.
      clipped: int32, how many examples were shortened.
      nonfinite: int32, how many examples were left out because their loss or gradient is NaN or
        inf.
      aux: the aux of each example, with a leading axis; None without `has_aux`.
    """

    losses: jax.Array
    norms: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    aux: Any


class _Each(NamedTuple):
    """What is known of each example: its loss, norm, factor and aux."""

    losses: jax.Array
    norms: jax.Array
    factors: jax.Array
    aux: Any


def clip_some(
    back: Backward, given: jax.Array, bound: ArrayLike, gamma: ArrayLike | None
) -> tuple[list[jax.Array], _Each]:
    """The weighted sums of clipped gradients, or of normalized ones if there is a γ."""
    # Both are looked at: a loss can be infinite where its gradient is not, as that of `x + inf`.
    fine = jnp.isfinite(back.norms) & jnp.isfinite(back.losses)
    # NaN for either, so that counts and losses need to look at the norm only.
    norms = jnp.where(fine, back.norms, jnp.nan)
    if gamma is None:
        factors = clip_weights(norms, bound)
    else:
        factors = normalizing_weights(norms, bound, gamma)
    sums = back.sums(factors * given.astype(factors.dtype))
    return sums, _Each(back.losses, norms, factors, back.aux)


def sum_weights(given: jax.Array) -> jax.Array:
    """Σw, by which a mean is divided; 1 if no example has a weight."""
    total = jnp.sum(given)
    return jnp.where(total > 0, total, 1)


def summarize(each: _Each, given: jax.Array, reduce: str) -> tuple[jax.Array, ClippedExamples]:
    """The value of the batch, and what happened to its examples. Padding does not count."""
    fine, real = jnp.isfinite(each.norms), given > 0
    clipped = jnp.sum(real & fine & (each.factors < 1), dtype=jnp.int32)
    nonfinite = jnp.sum(real & ~fine, dtype=jnp.int32)
    value = _pool_losses(each, given, reduce)
    return value, ClippedExamples(each.losses, each.norms, clipped, nonfinite, each.aux)


def _pool_losses(each: _Each, given: jax.Array, reduce: str) -> jax.Array:
    """The weighted sum or mean of the finite losses: 0 of padding only, NaN if none is finite."""
    wide = widen(each.losses)
    weights = jnp.where(jnp.isfinite(each.norms), given, 0).astype(wide.dtype)
    # Selected, not only multiplied: 0 · NaN is NaN.
    value = jnp.sum(jnp.where(weights > 0, wide, 0) * weights)
    if reduce == "mean":
        # Examples with weight, but none finite: 0/0 on purpose, as a mean of 0 would look perfect.
        value = value / jnp.where(jnp.any(given > 0), jnp.sum(weights), 1)
    return value.astype(each.losses.dtype)
