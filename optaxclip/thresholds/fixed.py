"""Thresholds that no gradient moves: numbers, schedules, and shares of the parameters' norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.leaves import map_blocks
from optaxclip.thresholds.combine import Threshold, as_threshold, bound_like, checked, new_threshold, stateless


def constant(bound: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """The same bound at every step: a number, a tracer, or an array with one number a block. A plain number means this.

    Raises:
      ValueError: if the bound is a negative number, NaN, a boolean or a string.
    """
    return unchanging(checked(bound, "constant", "bound"))


def unchanging(bound: Any) -> optax.GradientTransformationExtraArgs:
    """The same bound at every step, unchecked: it need not be known yet."""
    return stateless(lambda norms, params: jax.tree.map(functools.partial(bound_like, bound), norms))


class ScheduleState(NamedTuple):
    """State of `scheduled` and `until`. (Not called `count`: Optax users look that up by name.)

    Attributes:
      clip_step: int32, the updates so far.
      inner: the states of the thresholds inside.
    """

    clip_step: jax.Array
    inner: Any


def scheduled(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """The bound that `schedule(step)` returns, steps counted from 0. A plain function of the step means this.

    >>> import jax.numpy as jnp, optaxclip
    >>> threshold = optaxclip.scheduled(lambda step: 4.0 / (step + 1))
    >>> state = threshold.init(jnp.array(0.0))
    >>> bound, state = threshold.update(jnp.array(1.0), state)
    >>> float(bound), float(threshold.update(jnp.array(1.0), state)[0])
    (4.0, 2.0)
    """
    if not callable(schedule):
        raise ValueError(f"scheduled: schedule must be a function of the step, got {schedule!r}.")

    def update_fn(norms, state, params=None, **extra_args):
        bound = checked(schedule(state.clip_step), "scheduled", "the value of the schedule", wait=False)
        bounds = jax.tree.map(lambda n: bound_like(bound, n), norms)
        return bounds, ScheduleState(jnp.asarray(optax.safe_increment(state.clip_step)), ())

    return new_threshold(lambda norms: ScheduleState(jnp.zeros((), jnp.int32), ()), update_fn)


def until(steps: int, threshold: Threshold, then: Threshold = jnp.inf) -> optax.GradientTransformationExtraArgs:
    """One threshold for the first `steps` updates, another after; both learn from the first update on.

    `until(100, 1.0, adaptive)` is a warm-up with a fixed bound; `until(100, 1.0)` stops clipping after 100 updates.

    Raises:
      ValueError: if `steps` is negative or not a whole number.

    >>> import jax.numpy as jnp, optaxclip
    >>> threshold = optaxclip.until(1, 3.0)
    >>> bound, state = threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(1.0), state)[0])
    (3.0, inf)
    """
    if isinstance(steps, bool) or not jnp.issubdtype(jnp.result_type(steps), jnp.integer):
        raise ValueError(f"until: steps must be a whole number, got {steps!r}.")
    if isinstance(steps, int) and steps < 0:
        raise ValueError(f"until: steps must be at least 0, got {steps!r}.")
    both = as_threshold(threshold, "until", "threshold"), as_threshold(then, "until", "then")

    def init_fn(norms):
        return ScheduleState(jnp.zeros((), jnp.int32), tuple(t.init(norms) for t in both))

    def update_fn(norms, state, params=None, **extra_args):
        done = [t.update(norms, s, params, **extra_args) for t, s in zip(both, state.inner, strict=True)]
        (first, one), (second, two) = done
        bounds = jax.tree.map(lambda a, b: jnp.where(state.clip_step < steps, a, b), first, second)
        return bounds, ScheduleState(jnp.asarray(optax.safe_increment(state.clip_step)), (one, two))

    return new_threshold(init_fn, update_fn)


def param_relative(
    ratio: Threshold, floor: jax.typing.ArrayLike | None = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """A share of the parameters' own norm: ratio · max(‖w‖, floor), block by block.

    Args:
      ratio: the largest ratio of a block's norm to that of its parameters: a number, array, tracer or schedule.
      floor: the norm that parameters count for at least: a block of zeros (a fresh bias) has to move, too. With the
        usual 1e-3 and a ratio of 0.01 it starts with a bound of 1e-5: raise the floor if it should start faster.
        None: no floor, and no bound for blocks of zeros.

    Raises:
      ValueError: if ratio or floor is negative, NaN, a boolean or a string; where the clip is used, if it is called
        without parameters.
    """
    ratio = as_threshold(ratio, "param_relative", "ratio")
    floor = floor if floor is None else checked(floor, "param_relative", "floor")

    def bound(ratio, size):
        if floor is None:
            return (jnp.where(size == 0, jnp.inf, ratio * size),)
        return (ratio * jnp.maximum(size, bound_like(floor, size)),)

    def update_fn(norms, state, params=None, **extra_args):
        if params is None:
            raise ValueError("param_relative: the norms of the parameters are needed: call it from clip_by.")
        ratios, state = ratio.update(norms, state, params, **extra_args)
        return map_blocks(bound, 1, ratios, params())[0], state

    return new_threshold(ratio.init, update_fn)
