"""SPAM's momentum reset: the moments of an optimizer are reset at intervals, with a warm-up."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.engine import Description, guarded
from optaxclip.states import explain_leaves, init_inside
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
    """Resets an optimizer at regular intervals, each time with a warm-up.

    Updates are multiplied by 1 - 0.99·½·(1 + cos(π·t/N)) for N steps. A spike stays in Adam's
    moments for hundreds of steps; a reset removes it.

    Args:
      inner: what to reset: the part that holds the moments, such as `optax.scale_by_adam()`. Keep
        schedules outside, because their counters would be reset, too.
      every: the number of updates between resets.
      warmup_steps: N, the steps over which updates grow from 1 % to their full size after a reset
        and at the start; 0: no warm-up.

    Raises:
      ValueError: if `inner` is not an optimizer, `every` is not a whole number of at least 1, or
        `warmup_steps` not one of at least 0.

    Deviations: all of `inner`'s state is reset, including the counter of its bias correction (which
    goes on in the authors' code, where the first update after a reset is three times too long).

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
    validate.steps(1, every=every)
    validate.steps(warmup_steps=warmup_steps)
    inner, call = validate.as_optimizer(inner), validate.called()

    def init_fn(params):
        return ResetState(jnp.zeros((), jnp.int32), init_inside(call, inner, params))

    def update_fn(updates, state, params, **extra_args):
        # Decided before the optimizer runs, so that the fresh moments see the gradient of the step
        # at which the reset is due.
        due = state.reset_step >= every
        step = jnp.where(due, 0, state.reset_step)
        # Computed here and not kept in the state, which would double the memory for moments.
        fresh = inner.init(drop_gradientless(params, updates))
        with explain_leaves(call, updates):
            start = jax.tree.map(lambda a, b: _select(due, a, b), fresh, state.inner)
            updates, new = inner.update(updates, start, params, **extra_args)
        warm = _warmup(step, jnp.asarray(warmup_steps).astype(jnp.float32))
        return multiply(updates, warm), ResetState(jnp.asarray(optax.safe_increment(step)), new)

    return guarded(ResetState, init_fn, update_fn, Description(kind="other", inner=inner))


def _select(due, fresh, old):
    # The state may come from an `init` of parameters whose dtype differs from that of the updates.
    return jnp.where(due, jnp.asarray(fresh).astype(old.dtype), old)


def _warmup(step, steps):
    """Grows from 0.01 to 1 over so many steps, along half a cosine."""
    step = step.astype(jnp.float32)
    # Without warm-up `steps` is 0, and `jax.debug_nans` would stop at 0 / 0 although it is dropped.
    done = jnp.clip(step / jnp.maximum(steps, 1), 0, 1)
    return jnp.where(step < steps, 1 - 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * done)), 1)
