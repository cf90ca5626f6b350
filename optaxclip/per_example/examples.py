"""Clipping the examples of a batch, and reporting what happened to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.base import Blocks
from optaxclip.per_example.ghost import Backward
from optaxclip.xla import widen


class ClippedExamples(NamedTuple):
    """What happened to the examples of a batch.

    Attributes:
      losses: the loss of each example.
      norms: the norm of the gradient of each example, before the clip, in float32 at least; NaN
        if it is not finite. With blocks, (B, K): one norm per block.
      clipped: int32, how many examples were shortened in at least one block.
      nonfinite: int32, how many examples were left out because their loss or gradient is NaN or
        inf.
      aux: the aux of each example, with a leading axis; None without `has_aux`.
      unclipped: the mean (or sum) of the unclipped gradients, without the examples that are not
        finite; None without `keep_unclipped`.
    """

    losses: jax.Array
    norms: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    aux: Any
    unclipped: Any = None


class _Each(NamedTuple):
    """What is known about each example: its loss, norms and factors by block (B, K), and aux."""

    losses: jax.Array
    norms: jax.Array
    factors: jax.Array
    aux: Any


def clip_some(
    back: Backward,
    given: jax.Array,
    weigh: Callable[[jax.Array], jax.Array],
    keep_unclipped: bool,
) -> tuple[list[list[jax.Array]], _Each]:
    """Sums the weighted clipped gradients and, if kept, the unclipped ones."""
    # Both are checked: a loss can be infinite when its gradient is not, such as `x + inf`.
    fine = jnp.isfinite(back.losses) & jnp.all(jnp.isfinite(back.norms), axis=1)
    # NaN in either case, so that counts and losses need to check only the norm.
    norms = jnp.where(fine[:, None], back.norms, jnp.nan)
    factors = weigh(norms)
    kept = [factors, jnp.isfinite(norms).astype(norms.dtype)] if keep_unclipped else [factors]
    given = given.astype(norms.dtype)[:, None]
    sums = [back.sums(weights * given) for weights in kept]
    return sums, _Each(back.losses, norms, factors, back.aux)


def sum_weights(given: jax.Array) -> jax.Array:
    """Returns Σw, the divisor of a mean; 1 if no example has a weight."""
    total = jnp.sum(given)
    return jnp.where(total > 0, total, 1)


def summarize(
    each: _Each, given: jax.Array, reduce: str, blocks: Blocks
) -> tuple[jax.Array, ClippedExamples]:
    """Returns the value of the batch and what happened to its examples. Padding does not count."""
    fine, real = jnp.all(jnp.isfinite(each.norms), axis=1), given > 0
    shortened = jnp.any(each.factors < 1, axis=1)
    clipped = jnp.sum(real & fine & shortened, dtype=jnp.int32)
    nonfinite = jnp.sum(real & ~fine, dtype=jnp.int32)
    value = _pool_losses(each.losses, jnp.where(fine, given, 0), given, reduce)
    norms = each.norms[:, 0] if blocks.names is None else each.norms
    return value, ClippedExamples(each.losses, norms, clipped, nonfinite, each.aux)


def _pool_losses(losses: jax.Array, fine: jax.Array, given: jax.Array, reduce: str) -> jax.Array:
    """Pools the losses of examples that are fine: 0 for padding alone, NaN if none is fine."""
    wide = widen(losses)
    weights = fine.astype(wide.dtype)
    # Selected, not just multiplied: 0 · NaN is NaN.
    value = jnp.sum(jnp.where(weights > 0, wide, 0) * weights)
    if reduce == "mean":
        # If no example with weight is finite, 0/0 is intended: a mean of 0 would look perfect.
        value = value / jnp.where(jnp.any(given > 0), jnp.sum(weights), 1)
    return value.astype(losses.dtype)
