"""Thresholds from a running statistic in a few numbers: mean, mean and deviation, the last norm.

Averages are exact from the first norm on: its weight is 1, and weights fade towards 1 - decay,
which is the usual average divided by its bias correction. Deviations are kept as such, not as
squares, which would overflow at 1e19.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import feeds, validate, xla
from optaxclip.base import Feed, annotate
from optaxclip.thresholds.learned import Statistic, learned, multiple_of

Target = Literal["adaptive", "mean", "threshold"]


def debiased_weight(decay, norm, seen):
    """The weight of the t-th norm in an average with decay β: (1 - β) / (1 - βᵗ), at most 1."""
    # 1 - β is taken before rounding to float32, and 1 - βᵗ by logarithms: a float32 difference of
    # two numbers close to 1 loses half its digits.
    log = jnp.log1p(-xla.like(1 - xla.here(decay), norm))
    # Plus 1 after the cast: `seen` stops at the largest int32, and one more would be negative.
    return jnp.minimum(jnp.expm1(log) / jnp.expm1((xla.like(seen, norm) + 1) * log), 1)


def weight_so_far(rest, steps):
    """1 - βᵗ, with 1 - β = `rest`: the weight of t steps in a mean that began at 0."""
    # By logarithms, for the same reason.
    return -jnp.expm1(steps * jnp.log1p(-rest))


def debiased_mean(decay):
    """The `learn` of a running mean with decay β: m ← m + w·(n - m), with the weight above."""
    return lambda norm, mean, seen: mean + debiased_weight(decay, norm, seen) * (norm - mean)


@validate.named
def running(
    factor: ArrayLike = 2.0,
    decay: ArrayLike = 0.99,
    *,
    feed: Feed = feeds.clipped,
    relearn_after: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A multiple of the running mean of past norms: factor · mean. The first norm is free.

    Args:
      factor: the multiple.
      decay: β of the mean, from 0 to below 1.
      feed: what enters the mean. With `feeds.clipped` the mean follows a lasting rise by at most a
        factor of β + (1 - β) · factor per step.
      relearn_after: as in `learned`; `feeds.accepted` needs it.

    Raises:
      ValueError: for numbers out of range; for a factor of at most 1 with `feeds.clipped`: the mean
        of norms that are clipped to the mean can only fall.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.running(2.0)
    >>> _, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> round(float(threshold.update(jnp.array(9.0), state)[0]), 5)
    6.0
    """
    validate.nonnegative(factor=factor)
    validate.share(decay=decay)
    # Only for numbers: a tracer has no value yet.
    if feed is feeds.clipped and validate.is_static(factor) and factor <= 1:
        raise validate.fail(
            "factor must be larger than 1 with the feed clipped (or use feeds.raw)", factor
        )
    statistic = Statistic(0.0, debiased_mean(decay), multiple_of(factor))
    return learned(statistic, feed=feed, relearn_after=relearn_after)


@validate.named
def previous(ratio: ArrayLike = 1.01) -> optax.GradientTransformationExtraArgs:
    """A multiple of the last norm after its clip: norms may grow only so fast, and fall freely.

    Raises:
      ValueError: if ratio is a number below 1, with which norms could only fall.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.previous(2.0)
    >>> _, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(threshold.update(jnp.array(9.0), state)[0])
    6.0
    """
    validate.at_least(1, ratio=ratio)
    statistic = Statistic(0.0, lambda norm, value, seen: norm, multiple_of(ratio))
    threshold = learned(statistic, feed=feeds.clipped)
    # It limits growth and does not look for spikes, so `optaxclip.check` must not judge it as such.
    annotate(threshold.update, learns=False)
    return threshold


def _move(norm, value, weight, spread):
    """Adds a norm to mean and deviation: m + w·d and √((1 - w)·s² + spread·d²), d = norm - m."""
    mean, deviation = value
    d = norm - mean
    return mean + weight * d, jnp.hypot(jnp.sqrt(1 - weight) * deviation, jnp.sqrt(spread) * d)


@validate.named
def zscore(
    z: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    *,
    warmup_steps: ArrayLike = 25,
    target: Target = "adaptive",
    eps: ArrayLike = 1e-6,
    feed: Feed = feeds.clipped,
    relearn_after: ArrayLike | None = 100,
) -> optax.GradientTransformationExtraArgs:
    """Mean plus z deviations of past norms: a norm over m + z·σ is a spike, cut to the target.

    Args:
      z: how many deviations above the mean make a spike.
      decay: β of the running mean and variance after the warm-up.
      warmup_steps: how many first norms are not bounded; mean and variance start as the mean and
        population variance of these.
      target: what a spike is shortened to. "adaptive": m + z²/zₙ · σ with zₙ = (n - m) / σ, which
        is shorter the longer the spike; "mean": m; "threshold": m + z·σ.
      eps: σ is at least this share of the mean, so that rounding does not make spikes of norms that
        do not vary.
      feed: what enters mean and deviation.
      relearn_after: as in `learned`. Without it a lasting rise is never learned, because the
        targets are so close to the mean.

    Raises:
      ValueError: for numbers out of range, or an unknown target.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.zscore(2.0, warmup_steps=2, target="threshold")
    >>> state = threshold.init(jnp.array(0.0))
    >>> for norm in (1.0, 3.0):  # mean 2, deviation 1
    ...     _, state = threshold.update(jnp.array(norm), state)
    >>> round(float(threshold.update(jnp.array(9.0), state)[0]), 3)
    4.0
    """
    validate.nonnegative(z=z, eps=eps)
    validate.share(decay=decay)
    validate.steps(1, warmup_steps=warmup_steps)  # before the first norm mean and bound would be 0
    validate.choice(get_args(Target), target=target)

    def learn(norm, value, seen):
        warm = seen < xla.here(warmup_steps)
        weight = jnp.where(warm, 1 / xla.like(seen + 1, norm), xla.like(1 - xla.here(decay), norm))
        # After the warm-up the deviation is taken from the updated mean, as in the paper: hence the
        # square.
        return _move(norm, value, weight, weight * (1 - weight) * jnp.where(warm, 1, 1 - weight))

    def bound(norm, value, seen):
        mean, deviation = value
        # Relative to the mean: a fixed eps would dominate the deviation of norms around 1e-8.
        unit = jnp.maximum(deviation, xla.like(eps, norm) * mean)
        most = xla.like(z, norm)
        spike = norm > mean + most * unit
        far = jnp.where(spike, norm - mean, 1)
        # Multiplied in this order, because σ² would overflow from 1e19 on.
        towards = {"adaptive": most * most * unit / far * deviation, "mean": jnp.zeros_like(mean)}
        cut = spike & (target != "threshold")
        return mean + jnp.where(cut, towards.get(target, 0), most * unit)

    statistic = Statistic((0.0, 0.0), learn, bound)
    return learned(statistic, feed=feed, warmup_steps=warmup_steps, relearn_after=relearn_after)


@validate.named
def log_zscore(
    z: ArrayLike = 2.0,
    decay: ArrayLike = 0.95,
    *,
    warmup_steps: ArrayLike = 1,
    target: Literal["mean", "threshold"] = "mean",
    eps: ArrayLike = 1e-8,
    feed: Feed = feeds.raw,
    update_first: bool = True,
    relearn_after: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mean plus z deviations of the logarithms of norms, which are less skewed than norms.

    A norm over exp(m + z·s) is a spike. It is shortened to exp(m), the geometric mean, or to
    exp(m + z·s).

    Args:
      z: how many deviations above the mean make a spike.
      decay: β; the t-th norm has weight max(1 - β, 1/t), so that the first norms weigh the same.
      warmup_steps: how many norms must be seen before one is bounded.
      target: "mean" or "threshold": what a spike is shortened to.
      eps: the smallest variance of the logarithms.
      feed, update_first, relearn_after: as in `learned`.

    Raises:
      ValueError: for numbers out of range, or an unknown target.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.log_zscore(2.0, update_first=False, target="threshold")
    >>> state = threshold.init(jnp.array(0.0))
    >>> for norm in (1.0, 4.0):  # the geometric mean is 2, one deviation is a factor of 2
    ...     _, state = threshold.update(jnp.array(norm), state)
    >>> round(float(threshold.update(jnp.array(9.0), state)[0]), 3)
    8.0
    """
    validate.nonnegative(z=z, eps=eps)
    validate.share(decay=decay)
    validate.choice(("mean", "threshold"), target=target)

    def learn(norm, value, seen):
        weight = jnp.maximum(xla.like(1 - xla.here(decay), norm), 1 / xla.like(seen + 1, norm))
        # The logarithm of a zero is infinite, but a zero is not learned.
        return _move(jnp.log(norm), value, weight, weight * (1 - weight))

    def bound(norm, value, seen):
        mean, deviation = value
        least = jnp.sqrt(xla.like(eps, norm))
        longest = jnp.exp(mean + xla.like(z, norm) * jnp.maximum(deviation, least))
        if target == "threshold":
            return longest
        # Not `>`: as in TensorFlow's code a norm exactly at the limit counts as a spike.
        return jnp.where(norm >= longest, jnp.exp(mean), longest)

    statistic = Statistic((0.0, 0.0), learn, bound)
    return learned(
        statistic,
        feed=feed,
        update_first=update_first,
        warmup_steps=warmup_steps,
        relearn_after=relearn_after,
    )
