"""Stable-SPAM: elements held to the running maximum of their leaf, norms replaced by their signal-to-noise ratio."""

from typing import cast

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.actions import normalize
from optaxclip.algorithms.reset_moments import reset_moments
from optaxclip.apply import Nonfinite
from optaxclip.core import ClipState, clip_by
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.mesh import AxisNames
from optaxclip.norms import linf, widen
from optaxclip.scopes import Scope, leaf
from optaxclip.thresholds.learned import Statistic, learned, number
from optaxclip.thresholds.running import debiased_weight


def clip_by_running_max(
    decay: ArrayLike = 0.999,
    *,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens elements that stand out of their leaf: g ← g · T̂ / max|g| where |g| > T̂, T̂ the running mean of max|g|.

    The elements concerned keep their ratios, and the largest becomes T̂. In the paper it is AdaClip (a name that two
    other methods have, too).

    Args:
      decay: of the running mean, which learns the present maximum before it decides.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a decay outside [0, 1).

    Deviations: the bias correction counts the maxima that were learned (in the authors' code it starts anew at every
    reset of the moments, which makes T̂ 500 times too large: the clip is off most of the time).

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_running_max(0.5)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [4.0, 1.0]):  # T̂ = (0.5·1 + 1·4) / 1.5 = 3
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> [round(float(u), 3) for u in updates]
    [3.0, 1.0]
    """
    decay = number(decay, "clip_by_running_max", "decay", 0.0, 1.0)

    def learn(largest, mean, seen):
        return mean + debiased_weight(decay, largest, seen) * (largest - mean)

    threshold = learned(Statistic(0.0, learn, lambda largest, mean, seen: mean), order="before")
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    inner = clip_by(threshold, scope=leaf, norm=linf, **shared)

    def update_fn(updates, state, params=None, **extra_args):
        clipped, state = inner.update(updates, state, params, **extra_args)
        raw, short = measured_leaves(updates, exclude), measured_leaves(clipped, exclude)
        bound = cast(ClipState, state).metrics.clip_bound
        bounds = leaf.cut(raw.paths, [x.shape for x in raw.arrays]).spread(bound, jnp.ones_like(bound))
        picked = [
            jnp.where((jnp.abs(widen(x)) <= bound) & jnp.isfinite(y), x, y)
            for x, y, bound in zip(raw.arrays, short.arrays, bounds, strict=True)
        ]
        return raw.rebuild(picked), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def normalize_by_moments(
    b1: ArrayLike = 0.7,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    scope: Scope = leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf the norm m̂ / (√v̂ + ε), m̂ and v̂ the running means of its norm and of the square of its norm.

    That is about 1, whatever the scale of the gradient, so it belongs before an optimizer that does not mind scale. A
    spike of any size comes out at (1 - b1) / √(1 - b2) at most, 0.95 with the defaults. In the paper it is AdaGN,
    later the GradientStabilizer.

    Args:
      b1, b2: the decays of m and v; both learn the present norm before they decide.
      eps: ε, added to √v̂.
      scope: which numbers share one norm; the paper's is `leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a decay outside [0, 1), or a negative eps.

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.normalize_by_moments()
    >>> updates, _ = tx.update(jnp.array([3e-3, 4e-3]), tx.init(jnp.zeros(2)))
    >>> [round(float(u), 3) for u in updates]
    [0.6, 0.8]
    """
    call = "normalize_by_moments"
    b1, b2 = number(b1, call, "b1", 0.0, 1.0), number(b2, call, "b2", 0.0, 1.0)
    eps = number(eps, call, "eps", 0.0)

    def learn(norm, value, seen):
        mean, size = value
        weight = debiased_weight(b2, norm, seen)
        size = jnp.hypot(jnp.sqrt(1 - weight) * size, jnp.sqrt(weight) * norm)
        return mean + debiased_weight(b1, norm, seen) * (norm - mean), size

    def length(norm, value, seen):
        mean, size = value
        return mean / (size + jnp.asarray(eps).astype(norm.dtype))

    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    threshold = learned(Statistic((0.0, 0.0), learn, length), order="before")
    return clip_by(threshold, scope=scope, action=normalize, **shared)


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
    warmup_steps: ArrayLike = 150,
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM: Adam behind `clip_by_running_max` and `normalize_by_moments`, its moments reset every 1,000 steps.

    Args:
      learning_rate, b1, b2, eps, weight_decay: of `optax.adamw`.
      max_decay: of `clip_by_running_max`.
      norm_b1, norm_b2: of `normalize_by_moments`.
      every, warmup_steps: of `reset_moments`.

    References:
      Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.stable_spam(1e-3, warmup_steps=0)
    >>> updates, _ = tx.update(jnp.array([1e6]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    >>> round(float(updates[0]), 5)
    -0.001
    """
    return optax.chain(
        clip_by_running_max(max_decay),
        normalize_by_moments(norm_b1, norm_b2),
        reset_moments(optax.scale_by_adam(b1, b2, eps), every, warmup_steps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
