"""Centered clipping, for when some clients are attackers."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.aggregation.clients import (
    AggregateState,
    Arrays,
    ClientState,
    Round,
    add,
    aggregate,
    average,
    keep_finite,
    subtract,
)
from optaxclip.clips.carry import start_carry


@validate.named
def centered_clip(
    clip: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    *,
    momentum: ArrayLike = 0.9,
    iterations: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Clips how far each client is from the last mean: v ← v + mean(clip(mᵢ - v)), and u = v.

    mᵢ is the client's momentum: mᵢ ← β·mᵢ + (1 - β)·gᵢ. Whatever one of n clients sends, it moves v
    by at most 2τ/n per step and iteration, however long gradients are: the bound limits the spread
    of clients, not their length.

    Args:
      clip: as in `clipped_mean`; in the paper `clip_by_global_norm`. Its bound should be a little
        above the usual distance of an honest mᵢ from v. If it is too low, v lags behind, moving by
        τ per step.
      axis_name: as in `clipped_mean`.
      momentum: β. It averages out the noise of honest clients, in which an attacker hides; without
        it, a small error repeated at every step passes any clip. The optimizer after this needs no
        other momentum.
      iterations: how often v moves per step, with one all-reduce each. With more, v follows faster
        and attackers push harder. The clip learns from the first one only, and counts only that.

    Returns:
      As in `clipped_mean`: `update` takes the gradient of one client and returns v, the same
      for all.

    Raises:
      ValueError: as in `clipped_mean`; for a momentum outside [0, 1), or `iterations` below 1.

    Deviations: m and v begin at 0, so that a client whose first gradient is NaN begins like the
    others; in the paper's theory m begins as the first gradient. Values that are NaN or infinite
    leave m unchanged and count as nothing sent.

    It cannot help if half of the clients attack. If honest clients always differ by more than τ, v
    is not their mean. A spike decays in its client's momentum by β per step; until it is gone, that
    client does not help either.

    References:
      Karimireddy, He and Jaggi, `Learning from History for Byzantine Robust Optimization
      <https://arxiv.org/abs/2012.10333>`_, 2021

    >>> import jax, jax.numpy as jnp, optaxclip
    >>> from optaxclip.aggregation import AggregateState, centered_clip
    >>> tx = centered_clip(optaxclip.clip_by_global_norm(1.0), "clients", momentum=0.0)
    >>> rows, once = AggregateState(None, 0), {"axis_name": "clients", "axis_size": 4}
    >>> state = jax.vmap(tx.init, None, rows, **once)(jnp.zeros(1))
    >>> grads = jnp.array([[2.0], [2.0], [2.0], [-1e30]])
    >>> update = jax.jit(jax.vmap(tx.update, (0, rows), (None, rows), **once))
    >>> for _ in range(3):
    ...     v, state = update(grads, state)
    ...     print(v)
    [0.5]
    [1.]
    [1.5]
    """
    validate.share(momentum=momentum)
    validate.size(iterations=iterations)

    def start(params: Any) -> AggregateState:
        # Made twice, because two leaves that share a buffer cannot be donated.
        mean, own = (start_carry(params, None) for _ in range(2))
        return AggregateState(mean, ClientState(momentum=own))

    def step(current: Round, state: AggregateState) -> tuple[Arrays, AggregateState]:
        mean, own = state.mean, state.clients
        message = average(momentum, own.momentum, current.leaves.arrays)
        # Every iteration starts from the clip state before the step: later messages are shorter,
        # and a clip must not learn from them that clients have come closer.
        states = []
        for _ in range(iterations):
            cut, clip_state = current.send(subtract(message, mean), own.clip)
            mean = add(mean, current.pool(cut))
            states.append(clip_state)
        # Only the stored momentum is repaired: the clip has to see a NaN to count it.
        kept = list(map(keep_finite, message, own.momentum))
        return mean, AggregateState(mean, ClientState(states[0], kept))

    return aggregate(clip, axis_name, step, start)
