"""AdaGC: each leaf is clipped to a little more than the running mean of its own norms."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import feeds, scopes, thresholds, validate, xla
from optaxclip.actions import rescale
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.thresholds.blocks import new_threshold
from optaxclip.thresholds.convert import as_threshold
from optaxclip.thresholds.learned import multiple_of


@validate.named
def adagc(
    ratio: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: ArrayLike = 100,
    max_norm: Threshold = 1.0,
    *,
    relearn_after: ArrayLike | None = None,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to λ·γ, where γ is the running mean of its own norms after the clip.

    During warm-up the tree is clipped to a global norm of `max_norm`, and γ is the smallest norm of
    the leaf after that clip; from then on γ ← β·γ + (1 - β)·min(n, λ·γ).

    Args:
      ratio: λ, larger than 1. The bound can grow by a factor of β + (1 - β)·λ per step: 1.001 by
        default.
      decay: β.
      warmup_steps: how many norms a block learns from during warm-up.
      max_norm: the global norm during warm-up.
      relearn_after: resets a block that was over its bound on this many consecutive steps; None:
        never. With the defaults, following a tenfold rise takes 2,300 steps.
      scope: which numbers share one norm; the paper's is `scopes.leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a ratio of at most 1, with which bounds could only fall, a decay outside [0,
        1), or a bad `max_norm`.

    Deviations: a norm of zero is not learned (in the authors' code one exactly zero gradient during
    warm-up, such as that of a LoRA matrix, freezes the leaf forever), so a leaf's warm-up counts
    its own gradients. The authors' code takes the smallest norm before the global clip, and a ratio
    and decay of 1.03 and 0.98, later 1.04 and 0.99.

    References:
      Wang et al., `AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping
      <https://arxiv.org/abs/2502.11034>`_, ICML 2026

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.adagc(warmup_steps=1)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (0.5, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 3)  # 1.05 times 0.5
    0.525
    """
    validate.above(1, ratio=ratio)
    validate.share(decay=decay)

    def learn(norm, mean, seen):
        # Starts at the first norm even without warm-up: an average with infinity would be NaN, and
        # a mean that started at 0 would hold the leaf there forever.
        old = jnp.where(seen == 0, norm, mean)
        moved = old + xla.like(1 - xla.here(decay), norm) * (norm - old)
        return jnp.where(seen < xla.here(warmup_steps), jnp.minimum(old, norm), moved)

    threshold = thresholds.learned(
        thresholds.Statistic(math.inf, learn, multiple_of(ratio)),
        # The paper's order: the warm-up clip comes before the minimum. The authors' code learns the
        # norms before that clip.
        feed=feeds.clipped,
        warmup_steps=warmup_steps,
        warmup=_share_of_global(as_threshold(max_norm=max_norm)),
        relearn_after=relearn_after,
    )
    return clip_by(
        threshold, scope=scope, exclude=exclude, nonfinite=nonfinite, axis_names=axis_names
    )


def _share_of_global(max_norm: optax.GradientTransformationExtraArgs):
    """Bounds each block by its share of a global norm: n · min(1, max_norm / ‖n‖)."""

    def init_fn(norms):
        # All blocks share one bound, so its state must not have the shape of the norms.
        dtype = jax.tree.leaves(norms)[0].dtype if jax.tree.leaves(norms) else jnp.float32
        return max_norm.init(jnp.zeros((), dtype))

    def update_fn(norms: Any, state, params=None, **extra_args):
        rows = jax.tree.leaves(norms)
        if not rows:
            return norms, state
        largest = jnp.max(jnp.stack([jnp.max(n, initial=0) for n in rows]))
        # In units of the largest norm, so that no square overflows.
        unit = jnp.where(largest > 0, largest, 1)
        whole = unit * xla.root(jnp.asarray(sum(jnp.sum(jnp.square(n / unit)) for n in rows)))
        # The norm, not its square, by which a port of AdaGC divides.
        bound, state = max_norm.update(whole, state, params, **extra_args)
        share = rescale(whole, jnp.asarray(bound))
        return jax.tree.map(lambda n: n * share, norms), state

    return new_threshold(init_fn, update_fn, max_norm)
