# /// script
# dependencies = ["dynamax==1.0.3", "jax==0.12.0.1"]
# ///
"""dynamax: a linear Gaussian state space model, by `fit_sgd`."""

import jax
import jax.numpy as jnp
import optax
from dynamax.linear_gaussian_ssm import LinearGaussianSSM

from tests.clients.common import Trained, check


def train(optimizer):
    model = LinearGaussianSSM(state_dim=2, emission_dim=3)
    params, props = model.initialize(jax.random.PRNGKey(0))
    seen = jnp.cumsum(jax.random.normal(jax.random.PRNGKey(1), (4, 20, 3)), axis=1)
    fitted, losses = model.fit_sgd(
        params, props, seen, optimizer=optimizer, batch_size=2, num_epochs=20
    )
    return Trained(losses)


check(train, optax.sgd(0.05), bound=1.0)
