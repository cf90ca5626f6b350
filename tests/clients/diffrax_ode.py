# /// script
# dependencies = ["diffrax==0.7.2", "jax==0.12.0.1", "optax==0.2.8"]
# ///
"""Equinox and diffrax: a neural differential equation that learns to oscillate."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from tests.clients.common import Trained, check

TIMES = jnp.linspace(0.0, 2.0, 10)
STARTS = jax.random.normal(jax.random.key(1), (8, 2))
SEEN = jax.vmap(lambda t: jnp.stack([STARTS[:, 0] * jnp.cos(3 * t), STARTS[:, 1]], 1))(TIMES)


def solve(field, start):
    term = diffrax.ODETerm(lambda t, y, args: field(y))
    saved = diffrax.SaveAt(ts=TIMES)
    return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 2.0, dt0=0.2, y0=start, saveat=saved).ys


def train(optimizer):
    field = eqx.nn.MLP(2, 2, width_size=8, depth=1, key=jax.random.key(0))
    state = optimizer.init(eqx.filter(field, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(field, state):
        def loss_of(field):
            solved = jax.vmap(solve, in_axes=(None, 0), out_axes=1)(field, STARTS)
            return jnp.mean((solved - SEEN) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_of)(field)
        updates, state = optimizer.update(grads, state, eqx.filter(field, eqx.is_inexact_array))
        return eqx.apply_updates(field, updates), state, loss

    losses = []
    for _ in range(20):
        field, state, loss = step(field, state)
        losses.append(loss)
    return Trained(losses, state)


check(train, optax.sgd(0.3), bound=0.3)
