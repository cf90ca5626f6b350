"""Clipping each element by the second moment that Adam would have of it: SPAM's spike clip, and AdamWClip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.elements import Limits, clip_elements
from optaxclip.leaves import Exclude, as_exclude, measured_leaves
from optaxclip.mesh import AxisNames
from optaxclip.norms import widen
from optaxclip.thresholds.learned import number


class SecondMomentState(NamedTuple):
    """State of `spam_clip` and `adamw_clip`.

    Attributes:
      clip_step: int32, the updates so far; for `spam_clip` since the last reset.
      rms: √v, the root of the running mean of squares, element by element, in float32 at least. (Not v itself: squares
        of numbers over 1.8e19 overflow.)
    """

    clip_step: jax.Array
    rms: Any


def _clip_by_rms(
    bound_of: Callable[[jax.Array, jax.Array], jax.Array],
    decay: ArrayLike,
    every: ArrayLike | None,
    exclude: Exclude,
    axis_names: AxisNames | None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to ±bound_of(√v, step). v learns from what is left after the clip, and starts anew every `every` steps."""

    def init_fn(norm, params):
        leaves = measured_leaves(jax.tree.map(jnp.zeros_like, params), exclude)
        return SecondMomentState(jnp.zeros((), jnp.int32), leaves.rebuild([widen(x.real) for x in leaves.arrays]))

    def learn(x, bound, rms):
        size = jnp.minimum(jnp.abs(widen(x)), bound)
        rest = jnp.asarray(1 - decay).astype(rms.dtype)
        return jnp.where(jnp.isfinite(x), jnp.hypot(jnp.sqrt(1 - rest) * rms, jnp.sqrt(rest) * size), rms)

    def update_fn(norm, state, updates, params, **extra_args):
        step = state.clip_step if every is None else jnp.where(state.clip_step >= every, 0, state.clip_step)
        leaves, kept = measured_leaves(updates, exclude), measured_leaves(state.rms, exclude)
        old = kept.arrays if every is None else [jnp.where(step == 0, 0, rms) for rms in kept.arrays]
        bounds = [bound_of(rms, step) for rms in old]
        rms = kept.rebuild([learn(*each) for each in zip(leaves.arrays, bounds, old, strict=True)])
        return [(-bound, bound) for bound in bounds], SecondMomentState(jnp.asarray(optax.safe_increment(step)), rms)

    return clip_elements(Limits(init_fn, update_fn), exclude, axis_names)


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
