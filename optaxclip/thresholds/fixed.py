"""Thresholds that do not depend on gradients: numbers and schedules."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import Norms, annotate
from optaxclip.thresholds.blocks import Fixed, new_threshold


def _bound_like(bound: Any, norms: jax.Array) -> jax.Array:
    """A number, or one number per block, in the shape and dtype of the norms."""
    bound = xla.here(bound)
    # No broadcasting: bounds (3, 1) for norms (3,) would make factors (3, 3).
    if jnp.ndim(bound) and jnp.shape(bound) != norms.shape:
        raise ValueError(
            f"{validate.called()}: a bound must be one number, or one number per block: it has"
            f" shape {jnp.shape(bound)}, the norms have shape {norms.shape}."
        )
    # Round the bound, not the norm: a NumPy float64 must not widen the updates.
    return jnp.broadcast_to(jnp.asarray(bound).astype(norms.dtype), norms.shape)


@validate.named
def constant(bound: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """The same bound at every step: a number, a tracer, or an array with one number per block.

    A plain number means this wherever a threshold is expected.

    Raises:
      ValueError: if the bound is a negative number, NaN, a boolean or a string.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.constant(2.0)
    >>> norms = jnp.array([1.0, 3.0])
    >>> threshold.update(norms, threshold.init(norms))[0]
    Array([2., 2.], dtype=float32)
    """
    validate.threshold(bound=bound)
    return unchecked(bound)


def unchecked(bound: Any) -> optax.GradientTransformationExtraArgs:
    """Like `constant`, for bounds that were checked already, or that are made at every step."""

    def update_fn(norms, state, params=None, **extra_args):
        return jax.tree.map(functools.partial(_bound_like, bound), norms), state

    # For `optaxclip.check`, which does not look into closures.
    annotate(update_fn, bound=bound)
    return new_threshold(lambda norms: optax.EmptyState(), update_fn, kind=Fixed)


class ScheduleState(NamedTuple):
    """State of `scheduled`. (Not called `count`: Optax users look that up by name.)

    Attributes:
      clip_step: int32, the updates so far.
    """

    clip_step: jax.Array


def start_schedule(norms: Norms) -> ScheduleState:
    """The state before the first update."""
    return ScheduleState(jnp.zeros((), jnp.int32))


def advance(step: jax.Array) -> jax.Array:
    """One step more, up to the largest int32."""
    return jnp.asarray(optax.safe_increment(step))


@validate.named
def scheduled(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """The bound that `schedule(step)` returns, steps counted from 0.

    A plain function of the step means this wherever a threshold is expected.

    Raises:
      ValueError: if `schedule` is not a function; at the update, if it returns an invalid bound.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.scheduled(lambda step: 4.0 / (step + 1))
    >>> state = threshold.init(jnp.array(0.0))
    >>> bound, state = threshold.update(jnp.array(1.0), state)
    >>> float(bound), float(threshold.update(jnp.array(1.0), state)[0])
    (4.0, 2.0)
    """
    if not validate.is_function(schedule):
        raise validate.fail("schedule must be a function of the step", schedule)

    def update_fn(norms: Norms, state, params=None, **extra_args):
        bound = schedule(state.clip_step)
        # Checks the type, not the value, which would wait for the device at every step.
        validate.bound(**{"the value of the schedule": bound}, wait=False)
        bounds = jax.tree.map(lambda n: _bound_like(bound, n), norms)
        return bounds, ScheduleState(advance(state.clip_step))

    annotate(update_fn, bound=schedule)
    return new_threshold(start_schedule, update_fn, kind=Fixed)
