"""The Stable-SPAM optimizer."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.base import AxisNames
from optaxclip.clips.stable_spam import clip_by_running_max, normalize_by_moments
from optaxclip.engine import chain
from optaxclip.wrappers.reset_moments import reset_moments


@validate.named
def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    max_decay: ArrayLike = 0.999,
    norm_b1: ArrayLike = 0.7,
    norm_b2: ArrayLike = 0.9,
    every: ArrayLike = 1000,
    warmup_steps: ArrayLike = 0,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM: Adam after two clips, with its moments reset every 1,000 steps.

    The clips are `clip_by_running_max` and `normalize_by_moments`.

    Args:
      learning_rate, b1, b2, eps, weight_decay: as in `optax.adamw`.
      max_decay: `decay` of `clip_by_running_max`.
      norm_b1, norm_b2: `b1` and `b2` of `normalize_by_moments`.
      every, warmup_steps: as in `reset_moments`. Unlike SPAM, the authors' optimizer has no warm-up
        after a reset.
      axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range.

    Derivatives of updates (for meta-learning) are NaN at elements that were always zero, where
    Optax's Adam takes the root of v = 0.

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.stable_spam(1e-3)
    >>> updates, _ = tx.update(jnp.array([1e6]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    >>> round(float(updates[0]), 5)
    -0.001
    """
    # Checked under their names here; the parts would call them `decay`, `b1` and `b2`.
    validate.share(max_decay=max_decay, norm_b1=norm_b1, norm_b2=norm_b2)
    # Elements first, because otherwise a single spike would dominate the norm that divides the
    # rest. Each part counts its own steps: in the authors' code a reset of the moments restarts the
    # bias correction of the running maximum, too, which turns that clip off for hundreds of steps.
    return chain(
        clip_by_running_max(max_decay, axis_names=axis_names),
        normalize_by_moments(norm_b1, norm_b2, axis_names=axis_names),
        reset_moments(optax.scale_by_adam(b1, b2, eps), every, warmup_steps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
