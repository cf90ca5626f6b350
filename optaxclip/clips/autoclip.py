"""AutoClip: the bound is a percentile of the norms so far."""

from __future__ import annotations

import math

import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold


@validate.named
def autoclip(
    percentile: ArrayLike = 10.0,
    window: int = 1000,
    *,
    update_first: bool = True,
    max_norm: Threshold = math.inf,
    warmup_steps: ArrayLike | None = None,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to the p-th percentile of the last norms: τ = min(percentileₚ(n₁ … nₜ), max_norm).

    With the paper's p = 10, nine steps in ten are clipped and all updates have nearly the same
    length; p = 95 clips outliers.

    Args:
      percentile: p, from 0 (the smallest norm so far) to 100 (no clipping).
      window: how many norms are remembered, a Python int: two float32 numbers each, per block.
      update_first: whether a norm counts toward its own bound, as in the paper.
      max_norm: a cap on the bound, and the bound during warm-up.
      warmup_steps: how many norms must have been seen; None: 1, or the whole window without
        `update_first`.
      scope: which numbers share one norm: `scopes.tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a percentile outside [0, 100], a window that is not a whole number of at least
        1, or a negative cap.

    Deviations: a window instead of the whole history, which grows without end; norms that are zero
    or not finite are not remembered (in the authors' code one NaN stays forever). `autoclip(95.0,
    update_first=False, max_norm=1.0)` is the variant of TRELLIS.

    With a high percentile the bound follows a lasting explosion upwards; `max_norm` prevents that.

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
      <https://arxiv.org/abs/2007.14469>`_, 2020

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.autoclip(50.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates
    Array([3.], dtype=float32)
    """
    # If a norm is part of its own history, the first one already has a percentile: itself. TRELLIS,
    # which decides first, uses only `max_norm` until its window is full.
    if warmup_steps is None:
        warmup_steps = 1 if update_first else window
    threshold = thresholds.percentile(
        # Interpolated linearly, as in NumPy; bitsandbytes takes the nearest rank of squared norms.
        percentile,
        window,
        update_first=update_first,
        warmup_steps=warmup_steps,
    )
    return clip_by(
        # The cap also bounds the warm-up, during which the percentile is infinite.
        thresholds.at_most(threshold, as_threshold(max_norm=max_norm)),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
