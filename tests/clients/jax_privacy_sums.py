# /// script
# dependencies = ["jax-privacy==2.0.0", "jax==0.12.0.1"]
# ///
"""jax-privacy: our sums of clipped gradients of examples behind its noise, in place of its own."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax_privacy import clipping, noise_addition

import optaxclip as oc
from tests.clients.common import Trained, check

X = jax.random.normal(jax.random.key(0), (32, 4))
Y = X @ jnp.array([1.0, -2.0, 3.0, 0.5])


def loss_of(params, x, y):
    return jnp.mean((x @ params - y) ** 2)


SUM = oc.clipped_value_and_grad(lambda params, xy: loss_of(params, *xy), 1.0, reduce="sum")


def their_sum(params):
    return clipping.clipped_grad(loss_of, l2_clip_norm=1.0, batch_argnums=(1, 2))(params, X, Y)


def our_sum(params):
    return SUM(params, (X, Y))[1]


def train(optimizer, gradient):
    noise = noise_addition.gaussian_privatizer(stddev=0.5, prng_key=jax.random.key(1))

    def step(carry, _):
        params, state, noise_state = carry
        grads, noise_state = noise.update(gradient(params), noise_state)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, noise_state), loss_of(params, X, Y)

    params = jnp.zeros(4)
    carry = (params, optimizer.init(params), noise.init(params))
    (_, state, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=40))(carry)
    return Trained(losses, state)


our_train, their_train = (functools.partial(train, gradient=g) for g in (our_sum, their_sum))
check(our_train, optax.sgd(0.01), bound=5.0, theirs=their_train)
