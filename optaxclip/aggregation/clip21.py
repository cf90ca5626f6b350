"""Clip21 with many clients and two momenta, for clients whose data differ."""

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
    scale,
    subtract,
)
from optaxclip.clips.carry import start_carry


@validate.named
def clip21_sgd2m(
    clip: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    *,
    momentum: ArrayLike = 0.9,
    rate: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Clips what is new to each client: cᵢ = clip(mᵢ - sᵢ), sᵢ ← sᵢ + γ·cᵢ, u ← u + γ·mean(cᵢ).

    mᵢ is the client's momentum, mᵢ ← β·mᵢ + (1 - β)·gᵢ, and sᵢ is the sum of what it has sent. Once
    gradients settle, sᵢ converges to mᵢ for any bound, and u to the mean over clients. Clients that
    always differ by more than τ shift where `clipped_mean` ends, but not where this ends.

    Args:
      clip, axis_name: as in `clipped_mean`.
      momentum: β, the paper's 1 - β.
      rate: γ, the paper's β̂: the share of a message that is applied; 1 without noise.

    Returns:
      As in `clipped_mean`: `update` takes the gradient of one client and returns u, the same
      for all.

    Raises:
      ValueError: as in `clipped_mean`; for a momentum outside [0, 1), or a rate outside [0, 1].

    This is no defence against attackers: one of n moves u by at most 2γτ/n per step, but over many
    steps it can move u anywhere. An error fades once mᵢ has forgotten it, because sᵢ follows mᵢ.

    Deviations: no noise is added. For privacy, add it to cᵢ as the last part of
    `clip=optax.chain(...)`; here it enters sᵢ as well, in the paper only u. Values that are NaN or
    infinite leave m and s unchanged and count as nothing sent.

    References:
      Islamov et al., `Double Momentum and Error Feedback for Clipping with Fast Rates and
      Differential Privacy <https://arxiv.org/abs/2502.11682>`_, 2025; Khirirat et al., `Clip21
      <https://arxiv.org/abs/2305.18929>`_, 2023

    >>> import jax, jax.numpy as jnp, optaxclip
    >>> from optaxclip.aggregation import AggregateState, clip21_sgd2m
    >>> tx = clip21_sgd2m(optaxclip.clip_by_global_norm(1.0), "clients", momentum=0.0)
    >>> rows, once = AggregateState(None, 0), {"axis_name": "clients", "axis_size": 2}
    >>> state = jax.vmap(tx.init, None, rows, **once)(jnp.zeros(1))
    >>> grads = jnp.array([[3.0], [-1.0]])  # the mean of these is 1, and 0 if they are clipped
    >>> update = jax.jit(jax.vmap(tx.update, (0, rows), (None, rows), **once))
    >>> for _ in range(3):
    ...     u, state = update(grads, state)
    ...     print(u)
    [0.]
    [0.5]
    [1.]
    """
    validate.share(momentum=momentum)
    validate.between(0, 1, rate=rate)

    def start(params: Any) -> AggregateState:
        # Made three times, because leaves that share a buffer cannot be donated.
        mean, own, sent = (start_carry(params, None) for _ in range(3))
        return AggregateState(mean, ClientState(momentum=own, sent=sent))

    def step(current: Round, state: AggregateState) -> tuple[Arrays, AggregateState]:
        own = state.clients
        message = average(momentum, own.momentum, current.leaves.arrays)
        cut, clip_state = current.send(subtract(message, own.sent), own.clip)
        news = scale(rate, cut)
        # Not the mean of `sent`, because then no bound would limit what a client sends.
        mean, sent = add(state.mean, current.pool(news)), add(own.sent, news)
        # A NaN would stay in the momentum forever. `sent` has none, because a NaN is not sent.
        kept = list(map(keep_finite, message, own.momentum))
        return mean, AggregateState(mean, ClientState(clip_state, kept, sent))

    return aggregate(clip, axis_name, step, start)
