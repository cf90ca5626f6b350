"""Clipping by value: each element between two limits. It changes the direction of the gradient."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.apply import as_dtype_of
from optaxclip.core import ClipState
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.mesh import AxisNames, find_span
from optaxclip.norms import SUM, accumulator, linf, measure, times, widen
from optaxclip.record import Step, fresh_metrics, recorded
from optaxclip.scopes import tree
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite
from optaxclip.thresholds.fixed import ScheduleState


def _between(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Real numbers into [lower, upper]; complex ones to a modulus of at most `upper`, phase kept. NaN stays NaN."""
    wide = widen(x)
    lower, upper = lower.astype(wide.real.dtype), upper.astype(wide.real.dtype)
    if not jnp.iscomplexobj(x):
        return as_dtype_of(x, jnp.clip(wide, lower, upper))
    over = jnp.abs(wide) > upper
    return jnp.where(over, times(wide, upper / jnp.where(over, jnp.abs(wide), 1)), wide)


def _outside(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """How many elements the limits change."""
    size = jnp.abs(x) if jnp.iscomplexobj(x) else x
    return jnp.sum((size > upper) | (size < lower), dtype=upper.dtype)


class _Limits(NamedTuple):
    """Like a threshold, but `update(norm, state, params, **extra_args)` returns a pair of limits, and the state."""

    init: Callable[..., Any]
    update: Callable[..., tuple[tuple[jax.Array, jax.Array], Any]]


def _clip_elements(limits: _Limits, exclude: Exclude, axis_names: AxisNames | None):

    def init_fn(params):
        norm = jnp.zeros((), accumulator(measured_leaves(params, exclude).arrays))
        return ClipState(limits.init(norm), fresh_metrics(norm, {}))

    def update_fn(updates, state, params=None, **extra_args):
        state = init_fn(updates) if state is None else state
        leaves = measured_leaves(updates, exclude)
        cut = tree.cut(leaves.paths, [x.shape for x in leaves.arrays])
        span = find_span(leaves.arrays, leaves.paths, axis_names)
        norm = measure(linf, leaves.arrays, cut, span).norms.astype(state.metrics.grad_norm.dtype)
        (lower, upper), new = limits.update(norm, state.threshold, params, **extra_args)
        outside = cut.gather([_outside(widen(x), lower, upper).astype(norm.dtype) for x in leaves.arrays], SUM, span)
        count = cut.count([span.size(i) for i in range(len(leaves.arrays))])
        bound = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        factor = jnp.where(norm > bound, bound / jnp.where(norm == 0, 1, norm), 1)
        metrics = recorded(state.metrics, Step(norm, bound, factor, outside / max(float(count), 1.0)))
        clipped = [_between(x, lower, upper) for x in leaves.arrays]
        return leaves.rebuild(clipped), ClipState(new, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    threshold = as_threshold(max_delta, "clip", "max_delta")

    def update_fn(norm, state, params=None, **extra_args):
        bound, new = threshold.update(norm, state, params, **extra_args)
        bound = jnp.maximum(jnp.asarray(bound), 0)
        return (-bound, bound), hold_where_not_finite(norm, new, state)

    return _clip_elements(_Limits(threshold.init, update_fn), exclude, axis_names)


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
    limits = _limit(lower, "lower"), _limit(upper, "upper")

    def update_fn(norm, state, params=None, **extra_args):
        low, high = (jnp.asarray(limit(state.clip_step)).astype(norm.dtype) for limit in limits)
        return (low, high), ScheduleState(jnp.asarray(optax.safe_increment(state.clip_step)), ())

    signed = _Limits(lambda norm: ScheduleState(jnp.zeros((), jnp.int32), ()), update_fn)
    tx = _clip_elements(signed, exclude, axis_names)

    def only_real(updates, state, params=None, **extra_args):
        leaves = measured_leaves(updates, exclude)
        wrong = [path for path, x in zip(leaves.paths, leaves.arrays, strict=True) if jnp.iscomplexobj(x)]
        if wrong:
            raise ValueError(f"clip_by_value: complex numbers have no order; clip() clips their modulus: {wrong}.")
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, only_real)
