"""Clipping each element by its second moment, as in Adam: SPAM and AdamWClip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import trees, validate, xla
from optaxclip.base import AxisNames, Exclude
from optaxclip.clips.carry import start_carry
from optaxclip.clips.elements import clip_each
from optaxclip.engine import description_of, guarded
from optaxclip.thresholds.fixed import advance
from optaxclip.thresholds.running import weight_so_far


class SecondMomentState(NamedTuple):
    """State of `spam_clip` and `adamw_clip`.

    Attributes:
      clip_step: int32, how many updates so far; for `spam_clip`, since the last reset.
      rms: √v, the root of the running mean of squares, element by element, in float32 at least.
        (Not v itself: squares of numbers over 1.8e19 overflow.)
      clip: the `ClipState` of the clip, which records what it did.
    """

    clip_step: jax.Array
    rms: Any
    clip: Any


def _clip_by_rms(
    bound_of: Callable[[jax.Array, jax.Array], jax.Array],
    decay: ArrayLike,
    every: ArrayLike | None,
    exclude: Exclude,
    clip: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Clips to ±bound_of(√v, step). v learns clipped elements, and is reset every `every` steps."""

    def init_fn(params):
        rms = start_carry(params, exclude, real=True)
        return SecondMomentState(jnp.zeros((), jnp.int32), rms, clip.init(params))

    def learn(x, rms, step):
        """Computes the bound of each element of a leaf, and the new √v."""
        # A select, not a `cond`: counters are tracers, and a reset costs no more than the read.
        old = rms if every is None else jnp.where(step == 0, 0, rms)
        bound, rest = bound_of(old, step), xla.like(1 - decay, rms)
        # The size after the clip, as in both codes: a spike enters v at its bound.
        size = jnp.minimum(jnp.abs(xla.widen(x)), bound)
        # √(β·v + (1 - β)·x²) without a square, which would overflow.
        new = jnp.hypot(jnp.sqrt(1 - rest) * old, jnp.sqrt(rest) * size)
        return bound, jnp.where(jnp.isfinite(x), new, old)

    def update_fn(updates, state, params, **extra_args):
        due = every is not None and state.clip_step >= every
        step = jnp.where(due, 0, state.clip_step)
        leaves, kept = trees.select(updates, exclude), trees.select(state.rms, exclude)
        done = [learn(x, rms, step) for x, rms in zip(leaves.arrays, kept.arrays, strict=True)]
        # Limits are an argument of one clip: a clip built for each step would compile at each step.
        limits = [(-bound, bound) for bound, _ in done]
        clipped, clip_state = clip.update(updates, state.clip, limits=limits)
        rms = kept.rebuild([rms for _, rms in done])
        return clipped, SecondMomentState(advance(step), rms, clip_state)

    return guarded(SecondMomentState, init_fn, update_fn, description_of(clip))


@validate.named
def spam_clip(
    threshold: ArrayLike = 5000.0,
    decay: ArrayLike = 0.999,
    warmup_steps: ArrayLike = 20,
    every: ArrayLike | None = 500,
    *,
    measure: bool = False,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips elements whose square is over θ·v, where v is their running mean square, to ±√(θ·v).

    SPAM also resets Adam's moments:
    `optax.chain(spam_clip(), reset_moments(optax.scale_by_adam()), ...)`.

    Args:
      threshold: θ.
      decay: the decay of v; that of Adam.
      warmup_steps: how many updates after each reset pass unchanged.
      every: resets v every so many updates, together with Adam's moments; None: never.
      measure: whether to record the largest modulus and the share of elements clipped, which takes
        two more reads of the gradients; otherwise the metrics hold only the number of steps.
      exclude: as in `optaxclip.clip_by`.
      axis_names: as in `optaxclip.clip_by`; needed only with `measure`.

    Raises:
      ValueError: for a negative threshold, a decay outside [0, 1), or a negative number of steps.

    Deviations: an element with v = 0 (in a row of an embedding not used since the reset) is not
    clipped; in the authors' code it stays zero until the next reset. As in that code, v has no bias
    correction, so after a reset θ acts as if it were smaller. An element that is NaN stays NaN, and
    an infinite one is clipped; v learns from neither.

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset
      <https://arxiv.org/abs/2501.06842>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.spam_clip(4.0, decay=0.75, warmup_steps=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 0.0], [9.0, 9.0]):  # v = 1/4 and 0
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> updates
    Array([1., 9.], dtype=float32)
    """
    validate.nonnegative(threshold=threshold)
    validate.share(decay=decay)
    validate.steps(warmup_steps=warmup_steps)
    validate.flag(measure=measure)
    if every is not None:
        validate.steps(1, every=every)

    def bound(rms, step):
        # In the authors' code v = 0 makes a bound of 0, and elements clipped to 0 keep v at 0.
        free = (step < warmup_steps) | (rms == 0)
        return jnp.where(free, math.inf, jnp.sqrt(xla.like(threshold, rms)) * rms)

    clip = clip_each(measure=measure, exclude=exclude, axis_names=axis_names)
    return _clip_by_rms(bound, decay, every, exclude, clip)


@validate.named
def adamw_clip(
    ratio: ArrayLike = 3.0,
    decay: ArrayLike = 0.999,
    warmup_steps: ArrayLike = 0,
    floor: ArrayLike = 1e-10,
    *,
    measure: bool = False,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to ±max(k·√v̂, floor), where v̂ is its bias-corrected running mean square.

    Args:
      ratio: k. Elements can grow by a factor of √(β + (1 - β)·k²) per step, 1.004 by default.
      decay: β, the decay of v; that of Adam.
      warmup_steps: how many updates pass unchanged.
      floor: the smallest bound, in the units of the gradient.
      measure, exclude, axis_names: as in `spam_clip`.

    Raises:
      ValueError: for a negative ratio, floor or number of steps, or a decay outside [0, 1).

    Deviations: there is no bound where v = 0, as at the first update (in the authors' code such an
    element is clipped to the floor, and takes thousands of steps to grow from there). v is
    corrected for the updates it has seen (the authors' code counts one more). An element that is
    NaN stays NaN, and an infinite one is clipped; v learns from neither. Floor and warm-up are
    those of the authors' version 0.1.4; earlier ones had a floor of 0.01 under √v̂, which made the
    scale of the loss matter, and a warm-up of 10 steps.

    References:
      The code of `AdamWClip <https://github.com/wandeln/AdamWClip>`_; there is no paper.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.adamw_clip(3.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 4)
    3.0
    """
    validate.nonnegative(ratio=ratio, floor=floor)
    validate.share(decay=decay)
    validate.steps(warmup_steps=warmup_steps)
    validate.flag(measure=measure)

    def bound(rms, step):
        # At least 1, to avoid 0/0 at step 0, where v = 0 and nothing is bounded.
        seen = xla.like(jnp.maximum(step, 1), rms)
        corrected = rms / jnp.sqrt(weight_so_far(xla.like(1 - decay, rms), seen))
        most = jnp.maximum(xla.like(ratio, rms) * corrected, xla.like(floor, rms))
        return jnp.where((step < warmup_steps) | (rms == 0), math.inf, most)

    clip = clip_each(measure=measure, exclude=exclude, axis_names=axis_names)
    return _clip_by_rms(bound, decay, None, exclude, clip)
