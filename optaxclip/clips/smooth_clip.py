"""Clipping without a kink."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from optaxclip import scopes, validate
from optaxclip.actions import smooth
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold


@validate.named
def smooth_clip(
    max_norm: Threshold,
    p: ArrayLike = 2.0,
    *,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens every gradient, long ones more: g ← g / (1 + (‖g‖ / max_norm)ᵖ)^(1/p).

    The resulting norm is below `max_norm` and below ‖g‖. p = 1 is g·τ / (τ + ‖g‖), p = 2 is g / √(1
    + ‖g‖²/τ²), and p = inf is the hard clip. Small gradients are shortened too: at ‖g‖ = τ the
    factor is 0.5 for p = 1, 0.71 for 2, and 0.92 for 8.

    Args:
      max_norm: τ: a number, array, tracer, schedule or threshold.
      p: how sharp the bend is, from 1 to inf.
      scope: which numbers share one norm: `scopes.tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bad bound, or p < 1.

    References:
      Yu, Jakovetić and Kar, `Smoothed Gradient Clipping and Error Feedback for Distributed
      Optimization under Heavy-Tailed Noise <https://arxiv.org/abs/2310.16920>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.smooth_clip(1.0, p=1)
    >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
    Array([0.75], dtype=float32)
    """
    # p = 2 is SPECTRA's soft clip of singular values, applied to the norm of a block.
    return clip_by(
        as_threshold(max_norm=max_norm),
        # An action, so that bounds, scopes and metrics are those of the hard clip. Other smooth
        # forms (tanh, arctan) also bound the norm, but have no sharpness to choose.
        action=smooth(p),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
