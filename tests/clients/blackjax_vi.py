# /// script
# dependencies = ["blackjax==1.7.1", "jax==0.12.0.1"]
# ///
"""blackjax: mean-field variational inference, four runs side by side under `vmap`."""

import blackjax
import jax
import jax.numpy as jnp
import optax

from tests.clients.common import Trained, check


def logdensity(x):
    return -0.5 * jnp.sum((x["a"] - 3.0) ** 2 / 0.01) - jnp.sum(jnp.cosh(x["b"]))


def train(optimizer):
    vi = blackjax.meanfield_vi(logdensity, optimizer)

    @jax.jit
    @jax.vmap
    def run(key):
        start = vi.init({"a": jnp.zeros(2), "b": jnp.ones(3)})
        state, info = jax.lax.scan(lambda s, k: vi.step(k, s), start, jax.random.split(key, 40))
        return state, info.elbo

    state, elbo = run(jax.random.split(jax.random.key(0), 4))
    return Trained(elbo, state)


check(train, optax.adam(0.05), bound=300.0)
