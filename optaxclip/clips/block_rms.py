"""Clipping by the root mean square of a leaf: the update clipping of Adafactor."""

from __future__ import annotations

import optax

from optaxclip import scopes, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Threshold
from optaxclip.core import clip_by
from optaxclip.norms import rms


@validate.named
def clip_by_block_rms(
    threshold: Threshold,
    *,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf by its root mean square: u ← u / max(1, RMS(u) / threshold).

    This is Adafactor's update clipping. Place it after the preconditioner and before the learning
    rate; Adafactor's threshold is 1. docs/algorithms.md combines it with the relative step.

    Args:
      threshold: the bound: a number, array, tracer, schedule or threshold.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bound that is negative, NaN, a boolean or a string.

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_block_rms(1.0)
    >>> updates = jnp.array([3.0, 3.0])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([1., 1.], dtype=float32)
    """
    # Root mean square, not norm: one bound fits leaves of all sizes.
    # Scales by min(1, threshold / RMS). One port of Adafactor divides by min(1, RMS / threshold)
    # instead, which never shortens long updates but lengthens short ones.
    return clip_by(
        threshold,
        scope=scopes.leaf,
        norm=rms,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
