"""Centered clipping, for clients among whom some attack."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.aggregation.clients import (
    AggregateState,
    Arrays,
    ClientState,
    Meeting,
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

    mᵢ is the client's momentum: mᵢ ← β·mᵢ + (1 - β)·gᵢ. Whatever one of n clients sends moves v by
    at most 2τ/n a step and iteration, however long gradients are: the bound is held against the
    spread of clients, not against their length.

    Args:
      clip: as in `clipped_mean`; in the paper `clip_by_global_norm`. Its bound should be a little
        above the usual distance of an honest mᵢ from v. Too low, and v lags behind, by τ a step.
      axis_name: as in `clipped_mean`.
      momentum: β. It averages the noise of honest clients away, in which an attacker hides; a small
        error that is repeated at every step passes any clip without it. No optimizer behind this
        needs another momentum.
      iterations: how often v moves a step, each with an all-reduce of its own; more let it follow
        faster, and attackers push harder. The clip learns, and counts, of the first one.

    Returns:
      As `clipped_mean`: `update` takes the gradient of one client and returns v, the same for all.

    Raises:
      ValueError: as in `clipped_mean`; for a momentum not in [0, 1), or no iteration.

    Deviations: m and v begin at 0, where in the paper's theory the first gradient enters m whole: a
    client whose first gradient is NaN then begins as the others do. What is NaN or infinite leaves
    m as it is and sends nothing.

    It cannot help where half of the clients attack. Where honest clients differ by more than τ for
    good, v is no longer their mean. A spike decays in its client's momentum by β a step, and until
    then that client is no help either.

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
        # Twice, as two leaves with one buffer cannot be donated.
        mean, own = (start_carry(params, None) for _ in range(2))
        return AggregateState(mean, ClientState(momentum=own))

    def step(meeting: Meeting, state: AggregateState) -> tuple[Arrays, AggregateState]:
        mean, own = state.mean, state.clients
        message = average(momentum, own.momentum, meeting.leaves.arrays)
        # Each from the state before the step: of its later, shorter messages a clip must not learn
        # that clients have come closer.
        states = []
        for _ in range(iterations):
            cut, clip_state = meeting.send(subtract(message, mean), own.clip)
            mean = add(mean, meeting.pool(cut))
            states.append(clip_state)
        # Only what is remembered is mended: the clip has to see a NaN, to count it.
        kept = list(map(keep_finite, message, own.momentum))
        return mean, AggregateState(mean, ClientState(states[0], kept))

    return aggregate(clip, axis_name, step, start)
