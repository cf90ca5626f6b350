"""The mean of clipped gradients."""

from __future__ import annotations

import optax

from optaxclip import validate
from optaxclip.aggregation.clients import AggregateState, Arrays, Round, aggregate


@validate.named
def clipped_mean(
    clip: optax.GradientTransformation, axis_name: str | tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of each client, then takes the mean: u = mean(clip(gᵢ)).

    Whatever one of n clients sends, it moves the mean by at most 2τ/n in the norm of the clip; with
    a clip by value, it moves each number by at most that.

    Args:
      clip: any transformation of gradients: a clip of this library or of Optax, or a chain such as
        `optax.chain(optax.ema(0.9), optaxclip.clip_by_global_norm(1.0))`. Each client has its own
        state. Norms are those of one client; the clip's `axis_names` are only the axes over which a
        single client is spread.
      axis_name: the axis, or axes, of clients: of the mesh in `shard_map`, or as given to `vmap`
        and `pmap`.

    Returns:
      A transformation with an `AggregateState`, for use inside `shard_map`, `pmap` or `vmap`: its
      `update` takes the gradient of one client and returns updates that are the same for all.
      Inside `shard_map`, differentiate with respect to
      `jax.lax.pcast(params, axis_name, to="varying")` (in JAX 0.7 `jax.lax.pvary(params,
      axis_name)`); otherwise `jax.grad` adds up over clients. Call `init` in there, too.

    Raises:
      ValueError: for a `clip` that is not one, or a bad `axis_name`; at the update, if there is no
        such axis, or if by type the gradient is the same for all clients.

    Values that are NaN or infinite after the clip count as 0, and n stays n: a client that sends
    NaN contributes nothing. `nonfinite_steps` in `optaxclip.metrics`, whose values have an axis of
    clients here, counts such steps. Clients whose data differ are clipped unequally, which shifts
    where training ends: see `clip21_sgd2m`.

    >>> import jax, jax.numpy as jnp, optaxclip
    >>> from optaxclip.aggregation import AggregateState, clipped_mean
    >>> tx = clipped_mean(optaxclip.clip_by_global_norm(1.0), "clients")
    >>> rows, once = AggregateState(None, 0), {"axis_name": "clients", "axis_size": 4}
    >>> state = jax.vmap(tx.init, None, rows, **once)(jnp.zeros(1))
    >>> grads = jnp.array([[0.5], [0.5], [-1e30], [jnp.nan]])
    >>> update = jax.jit(jax.vmap(tx.update, (0, rows), (None, rows), **once))
    >>> update(grads, state)[0]
    Array([0.], dtype=float32)
    """

    def step(current: Round, state: AggregateState) -> tuple[Arrays, AggregateState]:
        client = state.clients
        cut, clip_state = current.send(current.leaves.arrays, client.clip)
        return current.pool(cut), state._replace(clients=client._replace(clip=clip_state))

    return aggregate(clip, axis_name, step)
