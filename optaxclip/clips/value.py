"""Clipping by value: each element between two limits. It changes the direction of the gradient."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.elements import Limits, clip_elements
from optaxclip.leaves import Exclude, as_exclude, measured_leaves
from optaxclip.mesh import AxisNames
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite
from optaxclip.thresholds.fixed import ScheduleState


def clip(
    max_delta: Threshold, *, exclude: Exclude = None, axis_names: AxisNames | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to [-max_delta, max_delta]; a complex element to that modulus, its phase kept.

    NaN stays NaN, infinity becomes the limit.

    Args:
      max_delta: the limit: a number, array, tracer, schedule, or a threshold of the largest modulus.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a limit that is negative, NaN, a boolean or a string.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip(1.0)
    >>> updates = jnp.array([-3.0, 0.5])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([-1. ,  0.5], dtype=float32)
    """
    threshold, exclude = as_threshold(max_delta, "clip", "max_delta"), as_exclude(exclude, "clip")

    def update_fn(norm, state, updates, params, **extra_args):
        bound, new = threshold.update(norm, state, params, **extra_args)
        bound = jnp.maximum(jnp.asarray(bound), 0)
        limits = [(-bound, bound)] * len(measured_leaves(updates, exclude).arrays)
        return limits, hold_where_not_finite(norm, new, state)

    return clip_elements(Limits(lambda norm, params: threshold.init(norm), update_fn), exclude, axis_names)


def _limit(value: Any, argument: str):
    """A limit as a function of the step."""
    if callable(value):
        return value
    bad = isinstance(value, bool | str) or value is None or (isinstance(value, numbers.Real) and value != value)
    if bad or jnp.ndim(value):
        raise ValueError(f"clip_by_value: {argument} must be a number, a scalar array or a schedule, got {value!r}.")
    return lambda step: value


def clip_by_value(
    lower: jax.typing.ArrayLike | optax.Schedule,
    upper: jax.typing.ArrayLike | optax.Schedule,
    *,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to [lower, upper]. NaN stays NaN, infinity becomes a limit.

    Args:
      lower, upper: the limits: numbers of any sign, scalar arrays, tracers or schedules.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a limit that is NaN, a boolean or a string, or if lower > upper; at the update, for complex leaves
        (`clip` takes them, by modulus).

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_value(-1.0, 2.0)
    >>> updates = jnp.array([-3.0, 0.5, 3.0])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([-1. ,  0.5,  2. ], dtype=float32)
    """
    if isinstance(lower, numbers.Real) and isinstance(upper, numbers.Real) and lower > upper:
        raise ValueError(f"clip_by_value: lower must not be larger than upper, got {lower!r} and {upper!r}.")
    limits, exclude = (_limit(lower, "lower"), _limit(upper, "upper")), as_exclude(exclude, "clip_by_value")

    def update_fn(norm, state, updates, params, **extra_args):
        leaves = measured_leaves(updates, exclude)
        wrong = [path for path, x in zip(leaves.paths, leaves.arrays, strict=True) if jnp.iscomplexobj(x)]
        if wrong:
            raise ValueError(f"clip_by_value: complex numbers have no order; clip() clips their modulus: {wrong}.")
        low, high = (jnp.asarray(limit(state.clip_step)).astype(norm.dtype) for limit in limits)
        return [(low, high)] * len(leaves.arrays), ScheduleState(jnp.asarray(optax.safe_increment(state.clip_step)), ())

    start = Limits(lambda norm, params: ScheduleState(jnp.zeros((), jnp.int32), ()), update_fn)
    return clip_elements(start, exclude, axis_names)
