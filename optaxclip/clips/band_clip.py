"""A floor and a ceiling around the running mean of a group's norms."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate, xla
from optaxclip.actions import band
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope
from optaxclip.core import clip_by
from optaxclip.thresholds.learned import multiple_of
from optaxclip.thresholds.running import debiased_mean


@validate.named
def band_clip(
    low: ArrayLike = 0.5,
    high: ArrayLike = 2.0,
    decay: ArrayLike = 0.99,
    *,
    scope: Scope | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps each group's norm between low · S and high · S.

    S is the running mean of its norms after the clip. Groups that explode are shortened and groups
    that vanish are lengthened, each relative to its own mean. The first norm is not limited.

    Args:
      low: the floor, from 0 (none) to 1.
      high: the ceiling, larger than 1.
      decay: the decay of the running mean.
      scope: which numbers share one norm; None: `scopes.groups()`, a module's leaves. The paper
        groups by the type of a module, across all layers: `scopes.groups(lambda path:
        path.split("/")[-2])`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a `low` outside [0, 1], or a `high` of at most 1.

    Deviations: the authors' scripts have a ceiling below the mean and a floor above the ceiling,
    which scales every gradient by 0.9; here the band must contain the mean. S is bias-corrected:
    theirs starts at 0, and so does the band. There is no schedule for the band, and no cap on a
    single scaling.

    References:
      Li, Wu and Chang, `AGGC: Adaptive Group Gradient Clipping
      <https://arxiv.org/abs/2601.11864>`_, 2026

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import scopes
    >>> tx = optaxclip.band_clip(scope=scopes.leaf)
    >>> params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    >>> _, state = tx.update({"a": jnp.ones(1), "b": jnp.ones(1)}, tx.init(params))
    >>> tx.update({"a": jnp.array([0.1]), "b": jnp.array([9.0])}, state)[0]
    {'a': Array([0.5], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    validate.between(0, 1, low=low)
    # Below 1, the mean would learn norms cut below the mean, and fall to 0.
    validate.above(1, high=high)
    validate.share(decay=decay)

    def keep_in_band(norms, bounds):
        # Before the first norm the bound is infinite, and a share of infinity is not a floor.
        share = xla.like(xla.here(low) / xla.here(high), norms)
        lowest = jnp.where(jnp.isinf(bounds), 0, bounds * share)
        return jnp.clip(norms, lowest, bounds)

    # Debiased: the authors' mean starts at 0, and so does the band.
    statistic = thresholds.Statistic(0.0, debiased_mean(decay), multiple_of(high))
    return clip_by(
        thresholds.learned(statistic, feed=keep_in_band),
        scope=scopes.groups() if scope is None else scope,
        # The floor is a share of the bound, high · S, because actions do not know the mean.
        action=band(low / high),
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
