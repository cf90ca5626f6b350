# /// script
# dependencies = ["flowjax==19.1.2", "jax==0.12.0.1"]
# ///
"""flowjax: a masked autoregressive flow, fitted to data by maximum likelihood."""

import jax
import jax.numpy as jnp
import optax
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data

from tests.clients.common import Trained, check


def train(optimizer):
    base = Normal(jnp.zeros(2))
    flow = masked_autoregressive_flow(jax.random.key(0), base_dist=base, flow_layers=2, nn_width=8)
    x = jax.random.normal(jax.random.key(1), (200, 2)) * jnp.array([1.0, 3.0]) + 2.0
    _, losses = fit_to_data(
        jax.random.key(2),
        flow,
        x,
        optimizer=optimizer,
        max_epochs=10,
        batch_size=50,
        show_progress=False,
    )
    return Trained(losses["train"] + losses["val"])


check(train, optax.adam(1e-2), bound=1.0)
