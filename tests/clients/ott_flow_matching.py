# /// script
# dependencies = ["ott-jax[neural]==0.6.0", "jax==0.12.0.1"]
# ///
"""ott-jax: flow matching of a Flax nnx model, with an `nnx.Optimizer`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ott.neural.methods.flow_matching import flow_matching_step, interpolate_samples
from ott.neural.networks.velocity_field.mlp import MLP

from tests.clients.common import Trained, check


def train(optimizer):
    model = MLP(2, hidden_dims=[16, 16], param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    held = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    step = nnx.jit(flow_matching_step)
    losses = []
    for key in jax.random.split(jax.random.key(1), 30):
        start, end = jax.random.normal(key, (2, 32, 2))
        losses.append(step(model, held, interpolate_samples(key, start, 5 * end + 3))["loss"])
    return Trained(losses, held.opt_state)


check(train, optax.adam(1e-2), bound=5.0)
