"""Thresholds that learn: a statistic of the norms so far, and the bound that follows from it.

Most published methods differ not in their statistic but in what enters it, and when. `learned`
keeps the two apart: a `Statistic` is a few lines for one block; what it is fed, whether it learns
before or after it decides, how it warms up and when it is reset are arguments.

A statistic never learns from a norm that is not finite, nor from zero (a frozen leaf, an unused
expert): every multiple of zero would be a bound of zero, and the block would stay locked forever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import feeds, validate, xla
from optaxclip.base import Feed, Threshold, annotate
from optaxclip.thresholds.blocks import new_threshold, over_blocks, start_blocks
from optaxclip.thresholds.convert import as_threshold


class Statistic(NamedTuple):
    """What a threshold learns, written for one block.

    Attributes:
      start: its value before the first norm, any pytree of numbers.
      learn: `(norm, value, seen) -> value` adds one norm; `seen`, int32, is the number of norms
        before it.
      bound: `(norm, value, seen) -> bound` for a norm; most do not depend on the norm itself.
      signed: whether zeros and negative numbers are learned as well, which losses need.
    """

    start: Any
    learn: Callable[[jax.Array, Any, jax.Array], Any]
    bound: Callable[[jax.Array, Any, jax.Array], jax.Array]
    signed: bool = False


def multiple_of(factor: ArrayLike) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The bound factor · value, of a statistic that is one number."""
    return lambda norm, value, seen: xla.like(factor, norm) * value


class BlockState(NamedTuple):
    """What is kept for each block, each array in the shape of the norms.

    Attributes:
      value: the statistic.
      seen: int32, the norms that it has learned from.
      over: int32, the consecutive norms over their bound, up to now.
    """

    value: Any
    seen: Any
    over: Any


class LearnedState(NamedTuple):
    """State of `learned`: a `BlockState`, and the state of the warm-up."""

    blocks: BlockState
    warmup: optax.OptState


@validate.named
def learned(
    statistic: Statistic,
    *,
    feed: Feed = feeds.raw,
    update_first: bool = False,
    warmup_steps: ArrayLike = 1,
    warmup: Threshold = math.inf,
    relearn_after: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A threshold from a statistic, for every block at once.

    Args:
      statistic: what is learned about one block, and the bound that follows.
      feed: what is learned from a norm, given its bound: `feeds.raw`, `feeds.clipped`,
        `feeds.accepted`, or a function `(norms, bounds) -> norms` in which infinity and NaN
        mean "nothing".
      update_first: whether a norm is learned, unclipped, before it is judged. If not, it is judged
        by the norms before it.
      warmup_steps: a block has the bound of `warmup` until it has learned from this many norms.
      warmup: the threshold of the warm-up; by default there is none.
      relearn_after: a block that was over its bound on this many consecutive steps has changed for
        good: its statistic is reset to the present norm (and warms up again). None: never. It is
        needed with a feed that does not let the statistic follow; else the block is locked forever.

    Raises:
      ValueError: for numbers out of range; for `update_first` with another feed than `feeds.raw`:
        there is no bound yet.

    >>> import jax.numpy as jnp
    >>> from optaxclip import feeds, thresholds
    >>> def longer(norm, value, seen):
    ...     return jnp.maximum(norm, value)
    >>> longest = thresholds.Statistic(0.0, longer, lambda norm, value, seen: 2 * value)
    >>> threshold = thresholds.learned(longest, feed=feeds.clipped)
    >>> bound, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(100.0), state)[0])
    (inf, 6.0)
    """
    _check(feed, update_first, warmup_steps, relearn_after)
    warmup = as_threshold(warmup=warmup)
    start = BlockState(statistic.start, 0, 0)

    def rule(norm, state, warmup_bound):
        value, seen, over = state
        if update_first:
            value, seen = _learn(statistic, norm, value, seen)
        # A user's statistic may return another dtype, which strict promotion would not mix.
        bound = statistic.bound(norm, value, seen).astype(norm.dtype)
        # Both bounds are computed, because blocks warm up one by one: each has its own count.
        bound = jnp.where(seen < xla.here(warmup_steps), warmup_bound, bound)
        if not update_first:
            value, seen = _learn(statistic, feed(norm, bound), value, seen)
        state = BlockState(value, seen, jnp.where(norm > bound, optax.safe_increment(over), 0))
        if relearn_after is not None:
            state = _reset(statistic, norm, state, relearn_after)
        return bound, state

    def init_fn(norms):
        return LearnedState(start_blocks(start, norms), warmup.init(norms))

    def update_fn(norms, state, params=None, **extra_args):
        warmup_bounds, warmup_state = warmup.update(norms, state.warmup, params, **extra_args)
        bounds, blocks = over_blocks(rule, start, norms, state.blocks, warmup_bounds)
        return bounds, LearnedState(blocks, warmup_state)

    annotate(update_fn, learns=True)
    return new_threshold(init_fn, update_fn, warmup)


def _check(feed, update_first, warmup_steps, relearn_after) -> None:
    """Raises for arguments of `learned` that are out of range."""
    validate.feed(feed=feed)
    validate.flag(update_first=update_first)
    validate.steps(warmup_steps=warmup_steps)
    if relearn_after is not None:
        validate.steps(1, relearn_after=relearn_after)
    if update_first and feed is not feeds.raw:
        must = "feed must be feeds.raw where update_first is True: there is no bound yet"
        raise validate.fail(must, feed)


def _learn(statistic: Statistic, norm, value, seen):
    """The statistic and its count after one more norm; unchanged if there is nothing to learn."""
    # The engine has checked norms already, but a feed may return infinity for a finite one.
    fine = jnp.isfinite(norm) & (statistic.signed | (norm > 0))
    # Replaced by 1 if there is nothing to learn: log(0) or inf - inf would be a false alarm under
    # `jax.debug_nans`, even if the result is not selected.
    new = statistic.learn(jnp.where(fine, norm, 1), value, seen)
    value = jax.tree.map(lambda new, old: jnp.where(fine, new.astype(old.dtype), old), new, value)
    return value, jnp.where(fine, optax.safe_increment(seen), seen)


def _reset(statistic: Statistic, norm, state: BlockState, relearn_after) -> BlockState:
    """The state; reset to the present norm if too many consecutive ones were over their bounds."""
    # Computed at every step and selected: under `vmap` a `cond` would do the same.
    start = start_blocks(BlockState(statistic.start, 0, 0), norm)
    fresh = BlockState(*_learn(statistic, norm, start.value, start.seen), start.over)
    locked = state.over >= xla.here(relearn_after)
    return jax.tree.map(lambda a, b: jnp.where(locked, a, b), fresh, state)
