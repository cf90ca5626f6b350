"""The norm-growth limiter of Fira and APOLLO: a norm may grow by one percent per step."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.convert import as_threshold


@validate.named
def limit_norm_growth(
    ratio: ArrayLike = 1.01,
    *,
    min_norm: Threshold = 0.0,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to γ times its last norm after the clip: nₜ ≤ γ · nₜ₋₁.

    Norms may fall freely.

    The papers place it after the scaling of the update, before the learning rate.

    Args:
      ratio: γ, at least 1.
      min_norm: a floor under the bound. After one tiny gradient (a batch of padding, say) norms
        grow back only by γ per step, from 1e-8 to 1 in 1,850 steps; with a floor they start there.
      scope: which numbers share one norm; the papers' is `scopes.leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a ratio below 1, or a bad floor.

    Deviations: a norm of exactly zero is ignored, because it would freeze the leaf forever; no 1e-8
    is added to the last norm.

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024; Zhu et al., `APOLLO
      <https://arxiv.org/abs/2412.05270>`_, 2024

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.limit_norm_growth(1.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (2.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates
    Array([3.], dtype=float32)
    """
    # `previous` learns clipped norms: with raw norms, a spike would raise the next bound.
    return clip_by(
        # In Fira and APOLLO the only floor is the 1e-8 that is added to the last norm: after one
        # batch of zeros, growth of 1 % per step starts from there.
        thresholds.at_least(thresholds.previous(ratio), as_threshold(min_norm=min_norm)),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
