"""AdaGC: each leaf is held to a little more than the running mean of its own norms."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import Nonfinite
from optaxclip.core import clip_by
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.scopes import Scope, leaf
from optaxclip.thresholds.combine import Threshold, as_threshold, clipped, new_threshold
from optaxclip.thresholds.learned import Statistic, learned, number


def adagc(
    ratio: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: ArrayLike = 100,
    max_norm: Threshold = 1.0,
    *,
    relearn_after: ArrayLike | None = None,
    scope: Scope = leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to λ·γ, γ the running mean of its own norms after the clip.

    In the warm-up the tree is clipped to a global norm of `max_norm`, and γ is the smallest norm of the leaf after that
    clip; from then on γ ← β·γ + (1 - β)·min(n, λ·γ).

    Args:
      ratio: λ, larger than 1. The bound can grow by a factor of β + (1 - β)·λ a step: 1.001 with the defaults.
      decay: β.
      warmup_steps: how many norms a block learns from in the warm-up.
      max_norm: the global norm of the warm-up.
      relearn_after: a block that was over its bound on this many steps without a break starts anew; None: never. With
        the defaults a tenfold rise takes 2,300 steps to follow.
      scope: which numbers share one norm; the paper's is `leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a ratio of at most 1, with which bounds could only fall, a decay outside [0, 1), a bad `max_norm`.

    Deviations: a norm of zero is not learned (in the authors' code one exactly zero gradient in the warm-up, as that of
    a LoRA matrix, freezes the leaf for ever), so a leaf's warm-up counts its own gradients. The authors' code takes the
    smallest norm before the global clip, and ratio and decay 1.03 and 0.98, later 1.04 and 0.99.

    References:
      Wang et al., `AdaGC: Improving Training Stability for Large Language Model Pretraining
      <https://arxiv.org/abs/2502.11034>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.adagc(warmup_steps=1)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (0.5, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 3)  # 1.05 times 0.5
    0.525
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    ratio, decay = number(ratio, "adagc", "ratio", 1.0), number(decay, "adagc", "decay", 0.0, 1.0)
    if isinstance(ratio, float | int) and ratio <= 1:
        raise ValueError(f"adagc: ratio must be larger than 1, got {ratio!r}: bounds could only fall.")

    def learn(norm, mean, seen):
        rest = jnp.asarray(1 - decay).astype(norm.dtype)
        return jnp.where(seen < warmup_steps, jnp.minimum(mean, norm), mean + rest * (norm - mean))

    statistic = Statistic(jnp.inf, learn, lambda norm, mean, seen: jnp.asarray(ratio).astype(norm.dtype) * mean)
    warmup = _share_of_global(as_threshold(max_norm, "adagc", "max_norm"))
    threshold = learned(statistic, feed=clipped, warmup_steps=warmup_steps, warmup=warmup, relearn_after=relearn_after)
    return clip_by(threshold, scope=scope, **shared)


def _share_of_global(max_norm: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Each block's share of a global norm: n · min(1, max_norm / ‖n‖)."""

    def update_fn(norms: Any, state, params=None, **extra_args):
        largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda n: jnp.max(n, initial=0), norms))
        unit = jnp.where(largest > 0, largest, 1)
        whole = unit * jnp.sqrt(jax.tree.reduce(jnp.add, jax.tree.map(lambda n: jnp.sum(jnp.square(n / unit)), norms)))
        bound, state = max_norm.update(whole, state, params, **extra_args)
        share = jnp.minimum(1, jnp.asarray(bound) / jnp.where(whole > 0, whole, 1))
        return jax.tree.map(lambda n: n * share, norms), state

    return new_threshold(lambda norms: max_norm.init(jnp.zeros((), jax.tree.leaves(norms)[0].dtype)), update_fn)
