# /// script
# dependencies = ["dm-haiku==0.0.17", "rlax==0.1.9", "jax==0.12.0.1", "optax==0.2.8"]
# ///
"""Haiku and rlax: a Q-network that learns from transitions."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import rlax

from tests.clients.common import Trained, check

KEYS = jax.random.split(jax.random.key(0), 4)
BEFORE, AFTER = jax.random.normal(KEYS[0], (2, 32, 4))
ACTIONS = jax.random.randint(KEYS[1], (32,), 0, 2)
REWARDS = 10 * jax.random.normal(KEYS[2], (32,))


def train(optimizer):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 2])(x)))
    learn = jax.vmap(rlax.q_learning)

    def loss_of(params):
        now, then = net.apply(params, BEFORE), net.apply(params, AFTER)
        errors = learn(now, ACTIONS, REWARDS, jnp.full(32, 0.9), then)
        return rlax.l2_loss(errors).mean()

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = net.init(KEYS[3], BEFORE)
    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(loss)
    return Trained(losses, state)


check(train, optax.sgd(0.03), bound=2.0)
