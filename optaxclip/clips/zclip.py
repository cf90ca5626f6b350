"""ZClip: a norm too many deviations above the running mean is a spike."""

from __future__ import annotations

import math

import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold
from optaxclip.thresholds.running import Target


@validate.named
def zclip(
    z: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: ArrayLike = 25,
    *,
    target: Target = "adaptive",
    eps: ArrayLike = 1e-6,
    max_norm: Threshold = math.inf,
    relearn_after: ArrayLike | None = 100,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms whose z-score zₜ = (n - μ) / σ is over z to μ + z²/zₜ · σ.

    μ and σ² are running averages of norms after the clip; they start from the first `warmup_steps`
    norms, which are not clipped.

    Args:
      z: how many deviations above the mean make a spike.
      decay: the decay of the running mean and variance.
      warmup_steps: how many norms they start from.
      target: what a spike is shortened to: "adaptive", as above; "mean": μ; "threshold": μ + zσ.
      eps: a lower limit on σ, as a share of μ.
      max_norm: a cap on the bound, also during warm-up. The authors' code caps at 1.0 by default.
      relearn_after: resets mean and deviation after this many consecutive spikes; None: never.
      scope: which numbers share one norm: `scopes.tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range or an unknown target.

    Deviations: a norm that is zero or not finite is not learned (one NaN turns the authors' code
    into a fixed clip forever); `relearn_after`, because with the paper's rule a lasting rise beyond
    a few σ is never learned: norms are clipped to near the mean before they enter it; `eps` is
    relative and not added, so that the scale of the loss does not matter. As in the authors' code,
    the variance is taken about the updated mean. For the same in log space, which suits norms
    better, see `clip_by_log_zscore`.

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.zclip(warmup_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 12.0):  # mean 2, deviation 1: 12 has z = 10, and 2 + 2.5²/10 = 2.625
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 3)
    2.625
    """
    # No `clip_factor`: the authors' code documents it as a multiple of z·σ, but it also multiplies
    # the mean, and a factor below 1 clips to below the mean. Here z alone sets the tightness.
    threshold = thresholds.zscore(
        z, decay, warmup_steps=warmup_steps, target=target, eps=eps, relearn_after=relearn_after
    )
    return clip_by(
        # Outside the statistic: a norm that only the cap shortens is learned unclipped, as in the
        # authors' code.
        thresholds.at_most(threshold, as_threshold(max_norm=max_norm)),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
