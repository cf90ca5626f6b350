"""The z-score of the logarithm of the norm: Chorowski's rule of 2014 and its modern form."""

from __future__ import annotations

import math
from typing import Literal

import optax
from jax.typing import ArrayLike

from optaxclip import feeds, scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold


@validate.named
def clip_by_log_zscore(
    z: ArrayLike = 2.0,
    decay: ArrayLike = 0.95,
    *,
    target: Literal["mean", "threshold"] = "mean",
    update_first: bool = True,
    warmup_steps: ArrayLike = 1,
    max_norm: Threshold = math.inf,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms over exp(μ + z·σ), with μ and σ of log n, to exp(μ), the geometric mean.

    Norms are positive and skewed, and their logarithms are nearly normal. A deviation is then a
    factor, the same at any scale.

    Args:
      z: how many deviations above the mean make a spike.
      decay: β; the weight of the t-th norm is max(1 - β, 1/t).
      target: what a spike is shortened to: "mean": exp(μ), as in the paper; "threshold": exp(μ +
        zσ), which does not jump.
      update_first: whether a norm is learned unclipped before it is judged, as in the authors'
        code, where the first few cannot be spikes. If not, it is judged by the norms before it, and
        a spike is learned at the length it is clipped to.
      warmup_steps: how many norms must have been seen; use about 25 without `update_first`.
      max_norm: a cap on the bound.
      scope: which numbers share one norm: `scopes.tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range or an unknown target.

    Deviations: norms that are zero or not finite are not learned, so nothing is added inside the
    logarithm; the deviation is tracked directly, not as the difference of two large averages.
    Without `update_first` the statistic is reset after 100 consecutive spikes.

    Chorowski et al. and Lingvo differ, and this is the former. Lingvo uses log(n + 1), so that a
    norm far below 1 is never a spike, and a deviation of at least 1e-3; it starts to judge after
    about 277 norms (a decay of 0.995), and skips the step. Its rule, with log n and counted norms,
    is `optaxclip.skip_spikes`.

    References:
      Chorowski et al., `End-to-end Continuous Speech Recognition using Attention-based Recurrent
      NN: First Results <https://arxiv.org/abs/1412.1602>`_, 2014

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_log_zscore(2.0, update_first=False, warmup_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 4.0, 9.0):  # the geometric mean is 2, one deviation is a factor of 2
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 3)
    2.0
    """
    # Nothing is added inside the logarithm (1e-8 in the authors' code): zeros are not learned.
    threshold = thresholds.log_zscore(
        z,
        decay,
        warmup_steps=warmup_steps,
        target=target,
        # The authors' code learns a norm before judging it, so there is no bound to clip it to yet.
        feed=feeds.raw if update_first else feeds.clipped,
        update_first=update_first,
        # Spikes are learned at their clipped length, near the mean, so a lasting rise never is.
        relearn_after=None if update_first else 100,
    )
    return clip_by(
        # Outside the statistic, which learns what it clipped itself, not what the cap clipped.
        thresholds.at_most(threshold, as_threshold(max_norm=max_norm)),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
