# /// script
# dependencies = ["penzai==0.2.5", "jax==0.12.0.1", "optax==0.2.8"]
# ///
"""penzai: named axes and a trainer that holds its state in variables."""

import jax
import optax
from penzai import pz
from penzai.models import simple_mlp
from penzai.toolshed.basic_training import StatefulTrainer

from tests.clients.common import Trained, check

X = pz.nx.wrap(jax.random.normal(jax.random.key(1), (16, 4)), "batch", "features")


def loss_of(model, state, rng):
    error = model(X).unwrap("batch", "features") - 10.0
    loss = (error**2).mean()
    return loss, state, loss


def train(optimizer):
    mlp = simple_mlp.MLP.from_config(
        name="mlp", init_base_rng=jax.random.key(0), feature_sizes=[4, 8, 1]
    )
    trainer = StatefulTrainer.build(jax.random.key(2), mlp, optimizer, loss_of)
    return Trained([trainer.step() for _ in range(30)], trainer.state.value)


check(train, optax.adam(0.1), bound=1.0, rtol=1e-5)
