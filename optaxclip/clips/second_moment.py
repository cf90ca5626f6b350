"""Clipping each element by the second moment that Adam would have of it: SPAM's spike clip, and AdamWClip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import trees, validate, xla
from optaxclip.base import AxisNames, Exclude
from optaxclip.clips.elements import clip_each
from optaxclip.states import StateGuard
from optaxclip.thresholds.fixed import advance
from optaxclip.thresholds.learned import like


class SecondMomentState(NamedTuple):
    """State of `spam_clip` and `adamw_clip`.

    Attributes:
      clip_step: int32, the updates so far; for `spam_clip` since the last reset.
      rms: √v, the root of the running mean of squares, element by element, in float32 at least. (Not v
        itself: squares of numbers over 1.8e19 overflow.)
      clip: the `ClipState` of the clip, with what it did.
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
    """Clips to ±bound_of(√v, step). v learns from what is left, and is reset every `every` steps."""

    def init_fn(params):
        rms = trees.map_measured(lambda x: jnp.zeros(x.shape, xla.real_dtype(x)), params, exclude)
        return SecondMomentState(jnp.zeros((), jnp.int32), rms, clip.init(params))

    guard = StateGuard(validate.called(), SecondMomentState, init_fn)

    @jax.jit(inline=True)
    def bounds_of(rms, step):
        old = rms if every is None else [jnp.where(step == 0, 0, x) for x in rms]
        return old, [bound_of(x, step) for x in old]

    def learn(x, bound, rms):
        size = jnp.minimum(jnp.abs(xla.widen(x)), bound)
        rest = like(1 - decay, rms)
        return jnp.where(jnp.isfinite(x), jnp.hypot(jnp.sqrt(1 - rest) * rms, jnp.sqrt(rest) * size), rms)
@@REST@@


def spam_clip(
    threshold: ArrayLike = 5000.0,
    decay: ArrayLike = 0.999,
    grace_steps: ArrayLike = 20,
    every: ArrayLike | None = 500,
    *,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips an element whose square is over θ·v, v its running mean square: g ← sign(g)·√(θ·v) where g² > θ·v.

    SPAM also resets Adam's moments: `optax.chain(spam_clip(), reset_moments(optax.scale_by_adam()), ...)`.

    Args:
      threshold: θ.
      decay: of v; that of Adam.
      grace_steps: how many updates after each reset pass as they are.
      every: v starts anew every so many updates, together with Adam's moments; None: never.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a negative threshold or a decay outside [0, 1).

    Deviations: where v = 0 (a row of an embedding that was not used since the reset) nothing is clipped: in the
    authors' code such an element stays zero until the next reset. As there, v has no bias correction: after a reset θ
    acts as if it were smaller. An element that is NaN stays NaN, an infinite one is clipped; v learns from neither.

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset <https://arxiv.org/abs/2501.06842>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.spam_clip(4.0, decay=0.75, grace_steps=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 0.0], [9.0, 9.0]):  # v = 1/4 and 0
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> updates
    Array([1., 9.], dtype=float32)
    """
    threshold, decay = number(threshold, "spam_clip", "threshold", 0.0), number(decay, "spam_clip", "decay", 0.0, 1.0)

    def bound(rms, step):
        free = (step < grace_steps) | (rms == 0)
        return jnp.where(free, jnp.inf, jnp.sqrt(jnp.asarray(threshold).astype(rms.dtype)) * rms)

    return _clip_by_rms(bound, decay, every, as_exclude(exclude, "spam_clip"), axis_names)


def adamw_clip(
    ratio: ArrayLike = 3.0,
    decay: ArrayLike = 0.999,
    floor: ArrayLike = 0.01,
    warmup_steps: ArrayLike = 10,
    *,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each element to ±k·max(√v̂, floor), v̂ its running mean square, bias-corrected.

    Args:
      ratio: k.
      decay: of v; that of Adam.
      floor: what √v̂ counts for at least, in the units of the gradient. Elements that have been zero can so move again.
      warmup_steps: how many updates pass as they are.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a negative ratio or floor, or a decay outside [0, 1).

    Deviations: v is corrected for the updates that it has seen (the authors' code counts one more). An element that is
    NaN stays NaN, an infinite one is clipped; v learns from neither.

    References:
      The code of `AdamWClip <https://github.com/wandeln/AdamWClip>`_; there is no paper.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.adamw_clip(3.0, warmup_steps=1)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 4)
    3.0
    """
    ratio, floor = number(ratio, "adamw_clip", "ratio", 0.0), number(floor, "adamw_clip", "floor", 0.0)
    decay = number(decay, "adamw_clip", "decay", 0.0, 1.0)

    def bound(rms, step):
        seen = jnp.expm1(jnp.maximum(step, 1).astype(rms.dtype) * jnp.log1p(-jnp.asarray(1 - decay).astype(rms.dtype)))
        size = jnp.maximum(rms / jnp.sqrt(-seen), jnp.asarray(floor).astype(rms.dtype))
        return jnp.where(step < warmup_steps, jnp.inf, jnp.asarray(ratio).astype(rms.dtype) * size)

    return _clip_by_rms(bound, decay, None, as_exclude(exclude, "adamw_clip"), axis_names)
