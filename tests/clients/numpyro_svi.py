# /// script
# dependencies = ["numpyro==0.22.0", "jax==0.12.0.1", "optax==0.2.8"]
# ///
"""numpyro: stochastic variational inference, which wraps the optimizer and holds its state."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from tests.clients.common import Trained, check


def model(x, y):
    slope = numpyro.sample("slope", dist.Normal(0, 10).expand([3]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def train(optimizer):
    x = jax.random.normal(jax.random.key(0), (50, 3))
    y = x @ jnp.array([1.0, -2.0, 3.0])
    svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
    result = svi.run(jax.random.key(1), 60, x, y, progress_bar=False)
    return Trained(result.losses, result.state)


check(train, optax.adam(0.05), bound=50.0)
