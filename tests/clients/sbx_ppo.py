# /// script
# dependencies = ["sbx-rl==0.28.0", "jax==0.10.2"]
# ///
"""sbx: PPO on CartPole; actor and critic are Flax train states, saved and loaded with the model."""

import pathlib
import tempfile

import jax.numpy as jnp
import optax
from sbx import PPO
from stable_baselines3.common.logger import KVWriter, Logger

from tests.clients.common import Trained, check


class Losses(KVWriter, list):
    def write(self, key_values, key_excluded, step=0):
        self += [float(value) for key, value in key_values.items() if key == "train/value_loss"]

    def close(self):
        pass


def train(optimizer):
    losses = Losses()
    # sbx puts Optax's clip before its optimizer: without a bound it does nothing.
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=64,
        batch_size=32,
        n_epochs=2,
        seed=0,
        max_grad_norm=jnp.inf,
        policy_kwargs={"optimizer_class": lambda learning_rate: optimizer},
    )
    model.set_logger(Logger(None, [losses]))
    model.learn(64 * 5, log_interval=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save(pathlib.Path(folder) / "model")
        loaded = PPO.load(pathlib.Path(folder) / "model")
    return Trained(losses, loaded.policy.vf_state)


check(train, optax.sgd(0.05), bound=0.5, rtol=1e-4)
