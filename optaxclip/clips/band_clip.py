"""A floor and a ceiling around the running mean of a group's norms."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.actions import band
from optaxclip.apply import Nonfinite
from optaxclip.core import clip_by
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.scopes import Scope, groups
from optaxclip.thresholds.learned import Statistic, learned, number
from optaxclip.thresholds.running import debiased_weight


def band_clip(
    low: float = 0.5,
    high: float = 2.0,
    decay: ArrayLike = 0.99,
    *,
    scope: Scope | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps each group's norm between low · S and high · S, S the running mean of its norms after the clip.

    Groups that explode are held, groups that vanish are lifted, each by its own measure. The first norm is free.

    Args:
      low: the floor, a Python number from 0 to 1; 0: none.
      high: the ceiling, a Python number larger than 1.
      decay: of the running mean.
      scope: which numbers share one norm; None: `groups()`, a module's leaves. The paper's is the type of a module,
        through all layers: `groups(lambda path: path.split("/")[-2])`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a `low` outside [0, 1], or a `high` of at most 1.

    Deviations: the authors' scripts have a ceiling below the mean and a floor over the ceiling, with which every
    gradient is scaled by 0.9; here the band must hold the mean. No schedule for the band, and no cap on one scaling.

    References:
      Li, Wu and Chang, `AGGC: Adaptive Group Gradient Clipping <https://arxiv.org/abs/2601.11864>`_, 2026

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.band_clip(scope=optaxclip.leaf)
    >>> _, state = tx.update({"a": jnp.ones(1), "b": jnp.ones(1)}, tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}))
    >>> tx.update({"a": jnp.array([0.1]), "b": jnp.array([9.0])}, state)[0]
    {'a': Array([0.5], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    low, high = number(low, "band_clip", "low", 0.0, 1.0 + 1e-9), number(high, "band_clip", "high", 1.0 + 1e-9)
    decay = number(decay, "band_clip", "decay", 0.0, 1.0)

    def learn(norm, mean, seen):
        return mean + debiased_weight(decay, norm, seen) * (norm - mean)

    def held(norms, bounds):
        lowest = jnp.where(jnp.isinf(bounds), 0, bounds * jnp.asarray(low / high, norms.dtype))
        return jnp.clip(norms, lowest, bounds)

    statistic = Statistic(0.0, learn, lambda norm, mean, seen: jnp.asarray(high, norm.dtype) * mean)
    return clip_by(learned(statistic, feed=held), scope=scope or groups(), action=band(low / high), **shared)
