"""Thresholds made of thresholds, and shares of the parameters' norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import feeds, validate, xla
from optaxclip.base import Feed, Threshold, annotate
from optaxclip.thresholds.blocks import hold, new_threshold, update_all
from optaxclip.thresholds.convert import as_threshold
from optaxclip.thresholds.fixed import advance


class LagState(NamedTuple):
    """State of `lag`: that of the threshold inside, and the bounds for the next norms."""

    inner: optax.OptState
    clip_bound: Any


@validate.named
def lag(threshold: Threshold, *, feed: Feed = feeds.raw) -> optax.GradientTransformationExtraArgs:
    """Decides first and learns after: the bound for a norm comes from the norms before it.

    There is no bound (infinity) until the first finite norm. Norms of zero are not learned.

    Args:
      threshold: what turns norms into bounds, for example `optax.chain(optax.ema(0.9),
        optax.scale(2.0))`: twice the running mean.
      feed: what the threshold learns from a norm, given its bound: `feeds.raw`, `feeds.clipped`,
        `feeds.accepted`, or a function `(norms, bounds) -> norms` in which infinity and NaN
        mean "nothing".

    >>> import jax.numpy as jnp, optax
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.lag(optax.scale(2.0))
    >>> bound, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(5.0), state)[0])
    (inf, 6.0)
    """
    inner = as_threshold(threshold=threshold)
    validate.feed(feed=feed)

    def init_fn(norms):
        unbounded = jax.tree.map(lambda n: jnp.full_like(n, math.inf), norms)
        return LagState(inner.init(norms), unbounded)

    def feed_on(norms, bounds):
        # Every multiple of a norm of zero (a frozen leaf, an unused expert) is a bound of zero,
        # which would freeze the block forever.
        return jnp.where(norms == 0, math.inf, feed(norms, bounds))

    def update_fn(norms, state, params=None, **extra_args):
        fed = jax.tree.map(feed_on, norms, state.clip_bound)
        # The threshold inside may be anyone's, so it always gets a finite number to compute with.
        safe = jax.tree.map(lambda n: jnp.where(jnp.isfinite(n), n, 1), fed)
        bounds, inner_state = inner.update(safe, state.inner, params, **extra_args)
        # The engine holds the state for norms that are not finite; a feed may leave out others.
        return state.clip_bound, hold(init_fn, fed, LagState(inner_state, bounds), state)

    annotate(update_fn, learns=True)
    return new_threshold(init_fn, update_fn, inner)


def _combine(pick: Callable, *both: optax.GradientTransformationExtraArgs):
    """A threshold that applies `pick` to the bounds of two others."""

    def update_fn(norms, state, params=None, **extra_args):
        # Both are updated, so both learn, whichever bound is used in the end.
        bounds, state = update_all(both, norms, state, params, **extra_args)
        # `jnp.minimum` keeps NaN, and a bound of NaN makes its block count as not finite.
        return jax.tree.map(pick, *bounds), state

    return new_threshold(lambda norms: tuple(t.init(norms) for t in both), update_fn, *both)


@validate.named
def at_most(threshold: Threshold, cap: Threshold) -> optax.GradientTransformationExtraArgs:
    """The smaller of two bounds: an adaptive threshold under an absolute cap.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.at_most(lambda step: 10.0 + step, 5.0)
    >>> float(threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))[0])
    5.0
    """
    return _combine(jnp.minimum, as_threshold(threshold=threshold), as_threshold(cap=cap))


@validate.named
def at_least(threshold: Threshold, floor: Threshold) -> optax.GradientTransformationExtraArgs:
    """The larger of two bounds: an adaptive threshold that cannot shrink to nothing.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.at_least(0.0, 1e-3)
    >>> round(float(threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))[0]), 6)
    0.001
    """
    return _combine(jnp.maximum, as_threshold(threshold=threshold), as_threshold(floor=floor))


class UntilState(NamedTuple):
    """State of `until`: the updates so far, int32, and the states of both thresholds."""

    # Not `count`, the name under which Optax users look up the steps of Adam.
    clip_step: jax.Array
    inner: tuple[optax.OptState, ...]


@validate.named
def until(
    steps: int, threshold: Threshold, then: Threshold = math.inf
) -> optax.GradientTransformationExtraArgs:
    """One threshold for the first `steps` updates, another after; both learn from the start.

    `until(100, 1.0, adaptive)` is a warm-up with a fixed bound; `until(100, 1.0)` stops clipping
    after 100 updates.

    Raises:
      ValueError: if `steps` is negative or not a whole number.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.until(1, 3.0)
    >>> bound, state = threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(1.0), state)[0])
    (3.0, inf)
    """
    validate.steps(steps=steps)
    both = as_threshold(threshold=threshold), as_threshold(then=then)

    def init_fn(norms):
        return UntilState(jnp.zeros((), jnp.int32), tuple(t.init(norms) for t in both))

    def update_fn(norms, state, params=None, **extra_args):
        each, inner = update_all(both, norms, state.inner, params, **extra_args)
        bounds = jax.tree.map(lambda a, b: jnp.where(state.clip_step < steps, a, b), *each)
        return bounds, UntilState(advance(state.clip_step), inner)

    return new_threshold(init_fn, update_fn, *both)


@validate.named
def param_relative(
    ratio: Threshold, floor: ArrayLike | None = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """A share of the parameters' own norm: ratio · max(‖w‖, floor), block by block.

    Args:
      ratio: the largest ratio of a block's norm to that of its parameters: a number, array, tracer
        or schedule.
      floor: the smallest norm that parameters count as, so that a block of zeros (a fresh bias) can
        move. With the usual 1e-3 and a ratio of 0.01 its bound is 1e-5 at first: raise the floor if
        it should start faster. None: no floor, and no bound for blocks of zeros.

    Raises:
      ValueError: if ratio or floor is negative, NaN, a boolean or a string; at the update, without
        parameters.

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import thresholds
    >>> tx = optaxclip.clip_by(thresholds.param_relative(0.1))
    >>> params = jnp.array([3.0, 4.0])
    >>> tx.update(jnp.array([0.0, 9.0]), tx.init(params), params)[0]
    Array([0. , 0.5], dtype=float32)
    """
    ratio = as_threshold(ratio=ratio)
    if floor is not None:
        validate.bound(floor=floor)

    # A share of zero is zero: without this case a block of zeros would never move.
    def bound(ratio, size):
        if floor is None:
            return jnp.where(size == 0, np.asarray(np.inf, size.dtype), ratio * size)
        return ratio * jnp.maximum(size, xla.like(floor, size))

    def update_fn(norms, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                f"{validate.called()}: the bound is a share of the parameters' norm: write"
                " tx.update(grads, state, params), not tx.update(grads, state)."
            )
        ratios, state = ratio.update(norms, state, params, **extra_args)
        return jax.tree.map(bound, ratios, params), state

    # The kind is given because this reads parameters even if the ratio inside does not.
    return new_threshold(ratio.init, update_fn, ratio, kind=optax.GradientTransformationExtraArgs)
