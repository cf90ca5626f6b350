"""Adaptive quantile clipping: the bound moves until a given share of the norms is below it."""

from __future__ import annotations

import math

import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold


@validate.named
def quantile_clip(
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    init: ArrayLike | None = 0.1,
    *,
    max_norm: Threshold = math.inf,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to a bound C that tracks a quantile of the norms: C ← C · exp(-η · (b - q)).

    b is 1 if the norm was within C, else 0, so C settles where a share q of the norms is within it.
    It moves by a factor of at most exp(η) per step, and no spike, however large, moves it further.

    Args:
      quantile: q, from 0 to 1.
      learning_rate: η.
      init: the first bound; None: the first norm.
      max_norm: a cap on the bound.
      scope: which numbers share one norm: `scopes.tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range.

    Deviations: the paper's b (and γ for q) is a noisy mean over many clients, for privacy; here it
    is from one step, without noise. Norms that are zero or not finite do not move C.

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.quantile_clip(0.5, init=1.0)
    >>> updates, state = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
    >>> float(updates[0]), round(float(tx.update(jnp.array([3.0]), state)[0][0]), 4)
    (1.0, 1.1052)
    """
    # C learns only from the comparison, not the size of a spike, so there is no feed to choose.
    return clip_by(
        # Geometric steps, not C - η(b - q), which the authors also give: that needs an η in the
        # units of the norm and can make C negative.
        thresholds.at_most(
            thresholds.quantile(quantile, learning_rate, init), as_threshold(max_norm=max_norm)
        ),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
