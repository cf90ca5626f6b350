"""SPAM's momentum reset: an optimizer forgets its moments from time to time, and warms up again."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.base import annotate
from optaxclip.engine import Description
from optaxclip.states import StateGuard, init_inside
from optaxclip.trees import drop_gradientless
from optaxclip.wrappers.steps import multiply


class ResetState(NamedTuple):
    """State of `reset_moments`.

    Attributes:
      reset_step: int32, the updates since the last reset.
      inner: the state of the optimizer inside.
    """

    reset_step: jax.Array
    inner: optax.OptState


@validate.named
def reset_moments(
    inner: optax.GradientTransformation, every: ArrayLike = 500, warmup_steps: ArrayLike = 150
) -> optax.GradientTransformationExtraArgs:
    """Resets an optimizer every so many updates, each time with a warm-up.

    Updates are multiplied by 1 - 0.99·½·(1 + cos(π·t/N)) for N steps. A spike stays in Adam's
    moments for hundreds of steps; a reset ends that.

    Args:
      inner: what is reset: the part that holds the moments, such as `optax.scale_by_adam()`. Keep
        schedules outside: their counters would be reset, too.
      every: how many updates between resets.
      warmup_steps: N, over which updates grow from 1 % to all of their size after a reset, and at
        the start; 0: none.

    Raises:
      ValueError: if `inner` is no optimizer, `every` is a number below 1, or `warmup_steps` is
        negative.

    Deviations: all of `inner`'s state is reset, the counter of its bias correction too (in the
    authors' code that goes on, and the first update after a reset is three times too long).

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset
      <https://arxiv.org/abs/2501.06842>`_, 2025

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optaxclip.reset_moments(optax.trace(0.5), every=2, warmup_steps=0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.ones(1), state)
    ...     print(float(updates[0]))
    1.0
    1.5
    1.0
    """
    validate.at_least(1, every=every)
    validate.nonnegative(warmup_steps=warmup_steps)
    inner, call = validate.as_optimizer(inner), validate.called()

    def init_fn(params):
        return ResetState(jnp.zeros((), jnp.int32), init_inside(call, inner, params))

    guard = StateGuard(call, ResetState, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        like = drop_gradientless(params, updates)
        guard.check(state, like)
        # Asked before the optimizer moves: the gradient at which it is due is the first that the
        # fresh moments see.
        due = state.reset_step >= every
        step = jnp.where(due, 0, state.reset_step)
        # Made in the step, and not kept: a second set of moments would be as large as the first.
        fresh = inner.init(like)
        start = jax.tree.map(lambda a, b: _select(due, a, b), fresh, state.inner)
        updates, new = inner.update(updates, start, params, **extra_args)
        warm = _warmup(step, jnp.asarray(warmup_steps).astype(jnp.float32))
        return multiply(updates, warm), ResetState(jnp.asarray(optax.safe_increment(step)), new)

    about = Description(kind="other", name=call, inner=inner)
    annotate(update_fn, description=about)
    return optax.GradientTransformationExtraArgs(guard.init, update_fn)


def _select(due, fresh, old):
    # `init` may have been given parameters of another dtype than the updates it is given here.
    return jnp.where(due, jnp.asarray(fresh).astype(old.dtype), old)


def _warmup(step, steps):
    """From 1 % to all of an update over so many steps, along half a cosine."""
    step = step.astype(jnp.float32)
    # No warm-up is 0 steps: 0 / 0, though it is dropped below, would be NaN to `jax.debug_nans`.
    done = jnp.clip(step / jnp.maximum(steps, 1), 0, 1)
    return jnp.where(step < steps, 1 - 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * done)), 1)
