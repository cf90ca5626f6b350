"""Clipping by value: each element between two limits. It changes the direction of the gradient."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import trees, validate, xla
from optaxclip.base import AxisNames, Exclude, Threshold, annotate
from optaxclip.clips.elements import clip_elements
from optaxclip.engine import description_of
from optaxclip.thresholds.blocks import Fixed, new_threshold
from optaxclip.thresholds.convert import as_threshold
from optaxclip.thresholds.fixed import ScheduleState, advance, start_schedule


@validate.named
def clip(
    max_delta: Threshold,
    *,
    measure: bool = False,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to [-max_delta, max_delta].

    A complex element is clipped to that modulus and keeps its phase. NaN stays NaN, and infinity
    becomes the limit. It reads nothing that the optimizer does not read anyway.

    Args:
      max_delta: the limit: a number, array, tracer, schedule, or a threshold of the largest
        modulus.
      measure: whether to record the largest modulus and the share of elements clipped, which takes
        one more read of the gradients; otherwise the metrics hold only the limit and the number of
        steps. A threshold that learns always measures.
      exclude: as in `optaxclip.clip_by`.
      axis_names: as in `optaxclip.clip_by`; needed only if something is measured.

    Raises:
      ValueError: for a limit that is negative, NaN, a boolean or a string.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip(1.0)
    >>> updates = jnp.array([-3.0, 0.5])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([-1. ,  0.5], dtype=float32)
    """
    validate.flag(measure=measure)
    threshold = as_threshold(max_delta=max_delta)

    def update_fn(norms, state, params=None, **extra_args):
        bound, state = threshold.update(norms, state, params, **extra_args)
        # A schedule or threshold may go below 0, and limits that cross would flip signs.
        bound = jnp.maximum(jnp.asarray(bound), 0)
        return (-bound, bound), state

    # The same kind, because the kind says what a threshold reads.
    limits = new_threshold(threshold.init, update_fn, threshold, kind=type(threshold))
    tx = clip_elements(limits, measure=measure, exclude=exclude, axis_names=axis_names)
    # A reader of the chain wants to see the threshold as it was given.
    annotate(tx.update, description=description_of(tx)._replace(threshold=threshold))
    return tx


@validate.named
def clip_by_value(
    lower: ArrayLike | optax.Schedule,
    upper: ArrayLike | optax.Schedule,
    *,
    measure: bool = False,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to [lower, upper]. NaN stays NaN, and infinity becomes a limit.

    Args:
      lower, upper: the limits: numbers of any sign, scalar arrays, tracers or schedules.
      measure, exclude, axis_names: as in `clip`.

    Raises:
      ValueError: for a limit that is NaN, a boolean or a string, or if lower > upper; at the
        update, for complex leaves (`clip` accepts them and clips their modulus).

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_value(-1.0, 2.0)
    >>> updates = jnp.array([-3.0, 0.5, 3.0])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([-1. ,  0.5,  2. ], dtype=float32)
    """
    validate.flag(measure=measure)
    limits = {"lower": lower, "upper": upper}
    validate.between(-math.inf, math.inf, **{k: v for k, v in limits.items() if not callable(v)})
    known = [validate.to_concrete(limit) for limit in limits.values()]
    if all(map(validate.is_static, known)) and known[0] > known[1]:
        raise validate.fail(f"lower must not be larger than upper, {upper!r}", lower)
    threshold = _limits(lower, upper)
    # Limits have any sign, so no single bound can be recorded: the larger modulus stands for both.
    inner = clip_elements(threshold, measure=measure, exclude=exclude, axis_names=axis_names)
    call = validate.called()

    def update_fn(updates, state, params=None, **extra_args):
        leaves = trees.select(updates, exclude)
        # Checked here and not in `clip_elements`, which clips complex numbers by their modulus.
        wrong = [p for p, x in zip(leaves.paths, leaves.arrays, strict=True) if jnp.iscomplexobj(x)]
        if wrong:
            raise ValueError(
                f"{call}: complex numbers have no order; clip() takes their modulus: {wrong}."
            )
        return inner.update(updates, state, params, **extra_args)

    annotate(update_fn, description=description_of(inner))
    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _limits(*limits: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a threshold that returns a lower and an upper limit."""

    def at(step, norm: jax.Array):
        each = (limit(step) if callable(limit) else limit for limit in limits)
        # Arrays are made only here: made with the clip, they would start JAX's backend, or leak a
        # tracer of the `jit` that the clip is built in.
        return tuple(xla.like(limit, norm) for limit in each)

    def fixed_fn(norms, state, params=None, **extra_args):
        return at(0, norms), state

    def scheduled_fn(norms, state, params=None, **extra_args):
        return at(state.clip_step, norms), ScheduleState(advance(state.clip_step))

    init, update = (lambda norms: optax.EmptyState()), fixed_fn
    if any(map(callable, limits)):
        init, update = start_schedule, scheduled_fn
    return new_threshold(init, annotate(update, bound=limits), kind=Fixed)
