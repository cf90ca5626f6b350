"""Stable-SPAM's clips: one for elements that stand out in their leaf, and one for norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate, xla
from optaxclip.actions import normalize, rescale
from optaxclip.base import AxisNames, Exclude, Nonfinite, Norms, Scope
from optaxclip.core import clip_by, decide, factor_of_bad
from optaxclip.engine import Description, Rule, build
from optaxclip.norms import linf
from optaxclip.thresholds.running import debiased_mean, debiased_weight
from optaxclip.trees import Leaves


@validate.named
def clip_by_running_max(
    decay: ArrayLike = 0.999,
    *,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens elements that stand out in their leaf: g ← g · T̂ / max|g| where |g| > T̂.

    T̂ is the running mean of max|g|. The shortened elements keep their ratios, and the largest
    becomes T̂. The paper calls it AdaClip (a name that two other methods also have).

    Args:
      decay: the decay of the running mean, which learns the current maximum before it decides.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a decay outside [0, 1).

    Deviations: the bias correction counts the maxima that were learned (in the authors' code it is
    reset with the moments, which makes T̂ 500 times too large, so the clip is mostly inactive).

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
    validate.share(decay=decay)
    bad = factor_of_bad(nonfinite)

    def measure(leaves: Leaves, layout: xla.Layout) -> Norms:
        return xla.measure(linf, leaves.arrays, layout)

    def act(leaves: Leaves, layout: xla.Layout, norms: Norms, bounds: Norms):
        step = decide(norms, bounds, rescale, bad)
        short = xla.scale(leaves.arrays, step.factors, layout=layout, zeros=bad == 0)
        # In a leaf that is not finite, nothing is within the limit: all of it is `short`, NaN or 0.
        limits = xla.spread(jnp.where(step.bad, -1, step.bounds), layout)
        return list(map(_pick, leaves.arrays, short, limits)), step

    # Its own count of maxima: the authors' code divides by 1 - βᵗ with a t that is reset with the
    # moments, although the mean is not.
    statistic = thresholds.Statistic(0.0, debiased_mean(decay), lambda largest, mean, seen: mean)
    threshold = thresholds.learned(statistic, update_first=True)
    description = Description(scopes.leaf, linf, threshold, exclude=exclude, kind="other")
    return build(description, Rule(measure, act), axis_names)


def _pick(x: jax.Array, short: jax.Array, limit: jax.Array) -> jax.Array:
    """Takes elements within the limit from the leaf, and the others from the shortened leaf."""
    size = jnp.abs(xla.widen(x))
    return jnp.where(size <= limit.astype(size.dtype), x, short)


@validate.named
def normalize_by_moments(
    b1: ArrayLike = 0.7,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf the norm m̂ / (√v̂ + ε).

    m̂ and v̂ are the running means of its norm and its squared norm. The result is about 1 at any
    scale of the gradient (if norms are well above ε), so the clip belongs before an optimizer that
    does not depend on scale. After steady norms, the result for a spike of any size is at most
    √(b1²/b2 + (1 - b1)²/(1 - b2)), 1.2019 with the defaults (for a spike 3.9 times as long; for the
    longest spikes it is 0.95). After any norms it is at most (1 - b1) / √((1 - b2) · (1 - b1²/b2)),
    1.4056. The paper calls it AdaGN, and later GradientStabilizer.

    Args:
      b1, b2: the decays of m and v; both learn the current norm before they decide.
      eps: ε, added to √v̂.
      scope: which numbers share one norm; the paper's is `scopes.leaf`.
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
    validate.share(b1=b1, b2=b2)
    validate.nonnegative(eps=eps)

    def learn(norm, value, seen):
        mean, size = value
        # m and v are each debiased by their own decay: the authors' bfloat16 runs have a b2 of
        # 0.99999, a memory of 100,000 steps.
        weight = debiased_weight(b2, norm, seen)
        # The root of v, because squares of norms overflow at 1.8e19.
        size = jnp.hypot(jnp.sqrt(1 - weight) * size, jnp.sqrt(weight) * norm)
        return mean + debiased_weight(b1, norm, seen) * (norm - mean), size

    def length(norm, value, seen):
        mean, size = value
        return mean / (size + xla.like(eps, norm))

    return clip_by(
        thresholds.learned(thresholds.Statistic((0.0, 0.0), learn, length), update_first=True),
        scope=scope,
        action=normalize,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
