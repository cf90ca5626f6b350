"""Thresholds that learn: a statistic of the norms so far, and the bound that follows from it.

What tells most published methods apart is not their statistic but what enters it, and when.  So `learned` takes the two
apart: a `Statistic` is a few lines for one block; what it is fed, whether it learns before or after it decides, how it
warms up and when it starts anew are arguments.

Nothing enters a statistic that could poison it or lock it for ever: no norm that is not finite, and no zero (a frozen
leaf, an unused expert), of which every multiple is a bound of zero.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.given import known
from optaxclip.thresholds.combine import (
    Feed,
    Threshold,
    as_threshold,
    hold_where_not_finite,
    new_threshold,
    over_blocks,
    raw,
    start_blocks,
)

Order = Literal["before", "after"]


class Statistic(NamedTuple):
    """What a threshold learns, written for one block.

    Attributes:
      start: its value before the first norm, any pytree of numbers.
      learn: `(norm, value, seen) -> value` takes in one more norm; `seen`, int32, is the number of norms before it.
      bound: `(norm, value, seen) -> bound` for a norm; most do not look at the norm itself.
      signed: whether zeros and negative numbers are learned, too: for losses.
    """

    start: Any
    learn: Callable[[jax.Array, Any, jax.Array], Any]
    bound: Callable[[jax.Array, Any, jax.Array], jax.Array]
    signed: bool = False


class BlockState(NamedTuple):
    """What is kept for each block.

    Attributes:
      value: the statistic.
      seen: int32, the norms that it has learned from.
      over: int32, the norms over their bound without a break, up to now.
    """

    value: Any
    seen: jax.Array
    over: jax.Array


class LearnedState(NamedTuple):
    """State of `learned`: a `BlockState` for each block (of arrays with one entry a block), and that of the warm-up."""

    blocks: Any
    warmup: optax.OptState


def learned(
    statistic: Statistic,
    *,
    feed: Feed = raw,
    order: Order = "after",
    warmup_steps: jax.typing.ArrayLike = 1,
    warmup: Threshold = jnp.inf,
    relearn_after: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A threshold from a statistic, for every block at once.

    Args:
      statistic: what is learned of one block, and the bound that follows.
      feed: what is learned of a norm, given its bound: `raw`, `clipped`, `accepted`, or a function
        `(norms, bounds) -> norms` in which NaN means "nothing".
      order: "after": the bound of a norm comes from the norms before it; "before": the norm is learned first, as it is.
      warmup_steps: a block is held to the bound of `warmup` until it has learned from this many norms.
      warmup: the threshold of the warm-up; by default there is none.
      relearn_after: a block that was over its bound on this many steps without a break has changed for good: its
        statistic starts anew from the present norm (and warms up again). None: never. A feed that does not let the
        statistic follow needs it, or the block is locked out for ever.

    Raises:
      ValueError: for an unknown `order`, or an `order` of "before" with a feed other than `raw`, for which there is no
        bound yet.

    >>> import jax.numpy as jnp, optaxclip
    >>> longest = optaxclip.Statistic(0.0, lambda norm, value, seen: jnp.maximum(norm, value), lambda n, v, seen: 2 * v)
    >>> threshold = optaxclip.learned(longest, feed=optaxclip.clipped)
    >>> bound, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(100.0), state)[0])
    (inf, 6.0)
    """
    if order not in get_args(Order) or (order == "before" and feed is not raw):
        raise ValueError(
            f"learned: order must be 'after', or 'before' with the feed raw; got {order!r}, feed={feed!r}."
        )
    warmup = as_threshold(warmup, "learned", "warmup")

    def decide(norm, value, seen, warmup_bound):
        bound = statistic.bound(norm, value, seen).astype(norm.dtype)
        return jnp.where(seen < warmup_steps, warmup_bound, bound)

    def rule(norm, state, warmup_bound):
        value, seen, over = state
        if order == "before":
            value, seen = _taken(statistic, norm, value, seen)
        bound = decide(norm, value, seen, warmup_bound)
        if order == "after":
            value, seen = _taken(statistic, feed(norm, bound), value, seen)
        state = BlockState(value, seen, jnp.where(norm > bound, optax.safe_increment(over), 0))
        return bound, state if relearn_after is None else _anew(statistic, norm, state, relearn_after)

    def init_fn(norms):
        return LearnedState(start_blocks(_fresh(statistic), norms), warmup.init(norms))

    def update_fn(norms, state, params=None, **extra_args):
        warmup_bounds, warmup_state = warmup.update(norms, state.warmup, params, **extra_args)
        bounds, blocks = over_blocks(rule, norms, state.blocks, warmup_bounds)
        return bounds, LearnedState(jax.tree.map(hold_where_not_finite, norms, blocks, state.blocks), warmup_state)

    return new_threshold(init_fn, update_fn)


def _fresh(statistic: Statistic) -> BlockState:
    return BlockState(statistic.start, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _taken(statistic: Statistic, norm, value, seen):
    """The statistic after one more norm, and how many it has seen; as they were if that is nothing to learn from."""
    new = statistic.learn(norm, value, seen)
    fine = jnp.isfinite(norm) & (statistic.signed | (norm > 0))
    value = jax.tree.map(lambda new, old: jnp.where(fine, new.astype(old.dtype), old), new, value)
    return value, jnp.where(fine, optax.safe_increment(seen), seen)


def _anew(statistic: Statistic, norm, state: BlockState, relearn_after) -> BlockState:
    """The state; started again from this norm if too many were over their bounds without a break."""
    start = start_blocks(_fresh(statistic), norm)
    fresh = BlockState(*_taken(statistic, norm, start.value, start.seen), start.over)
    return jax.tree.map(lambda a, b: jnp.where(state.over >= relearn_after, a, b), fresh, state)


def number(value: Any, call: str, argument: str, low: float, high: float = math.inf) -> Any:
    """`value`, if it is a number from `low` to below `high` (or infinite, if that is), a scalar array, or a tracer.

    Raises:
      ValueError: naming the call and the argument.
    """
    seen = known(value)
    if isinstance(seen, jax.Array) and seen.ndim == 0:
        return value
    seen = seen.item() if isinstance(seen, np.generic | np.ndarray) and seen.ndim == 0 else seen
    real = jnp.isscalar(seen) and not isinstance(seen, bool | str | complex)
    if not real or not (low <= seen < high or seen == high == math.inf):
        raise ValueError(f"{call}: {argument} must be a number from {low:g} to below {high:g}, got {value!r}.")
    return value


def whole(value: Any, call: str, argument: str) -> int:
    """`value`, if it is a whole number of at least 1.

    Raises:
      ValueError: naming the call and the argument; for a tracer saying how to keep `optax.inject_hyperparams` off.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{call}: {argument} sets the size of the state and must be a Python int, not an array. With"
            f" optax.inject_hyperparams write inject_hyperparams({call}, static_args=({argument!r},))."
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{call}: {argument} must be a whole number of at least 1, got {value!r}.")
    return value
