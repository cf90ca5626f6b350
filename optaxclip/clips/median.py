"""Clipping by the median of recent norms: the clip of ScaledAdam, the optimizer of Zipformer."""

from __future__ import annotations

import math

import jax
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, SizedView, Threshold
from optaxclip.core import clip_by
from optaxclip.norms import rms
from optaxclip.thresholds.convert import as_threshold


@validate.named
def clip_by_median(
    scale: ArrayLike = 2.0,
    window: int = 100,
    every: int = 100,
    *,
    scale_by_params: bool = False,
    max_norm: Threshold = math.inf,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to a multiple of the median of the last norms: τ = scale · median(nₜ₋₁₀₀ … nₜ₋₁).

    The bound is refreshed every 100 steps. At the start it is also refreshed after 10, 20 and 40
    norms, and is then twice as large; before that there is no bound.

    Args:
      scale: the multiple.
      window: how many norms are remembered, a Python int.
      every: the number of steps between refreshes of the bound, a Python int.
      scale_by_params: whether the norm is that of g · rms(w), leaf by leaf, as in ScaledAdam, whose
        steps are proportional to the parameters; `update` then needs `params`.
      max_norm: a cap on the bound.
      scope: which numbers share one norm; ScaledAdam's is a parameter group.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a negative scale, or a window or period that is not a whole number of at least
        1.

    Deviations: norms that are zero or not finite are not remembered; a gradient that is not finite
    is handled by `nonfinite` (ScaledAdam: zeros); scalars are not scaled by their own rate, and
    rms(w) is that of the current parameters (ScaledAdam refreshes it every few steps), one per
    leaf, even if a leaf stacks layers.

    References:
      Yao et al., `Zipformer: A faster and better encoder for automatic speech recognition
      <https://arxiv.org/abs/2310.11230>`_, 2023, and its optimizer's code

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_median(2.0, window=3, every=3)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 9.0, 3.0, 8.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates
    Array([6.], dtype=float32)
    """
    # A flag, not an array, because it decides whether `update` needs parameters.
    validate.flag(scale_by_params=scale_by_params)
    bound = thresholds.median(scale, window, every)
    return clip_by(
        # The rule has no bound before its tenth norm, so only a cap can limit the first steps.
        thresholds.at_most(bound, as_threshold(max_norm=max_norm)),
        # Only the norm is that of g · rms(w); the factor is applied to g, as in ScaledAdam.
        view=_BY_RMS if scale_by_params else None,
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )


def _scale(g: jax.Array, size: jax.Array) -> jax.Array:
    return g * size.astype(g.real.dtype)


# Per leaf, whatever the scope, because ScaledAdam keeps one root mean square per tensor.
_BY_RMS = SizedView(rms, _scale)
