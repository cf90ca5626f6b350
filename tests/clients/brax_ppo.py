# /// script
# dependencies = ["brax==0.14.2", "jax==0.9.2"]
# ///
"""brax: PPO in `pmap` over two devices. It takes no optimizer, so the one it makes is replaced."""

from unittest import mock

import jax
import optax
from brax import envs
from brax.training.agents.ppo.train import train as train_ppo

from tests.clients.common import Trained, check

jax.config.update("jax_num_cpu_devices", 2)


def train(optimizer):
    losses = []
    with mock.patch("optax.adam", return_value=optimizer):
        train_ppo(
            environment=envs.get_environment("fast"),
            num_timesteps=512,
            episode_length=16,
            num_envs=8,
            batch_size=8,
            num_minibatches=2,
            unroll_length=4,
            num_evals=4,
            run_evals=False,
            progress_fn=lambda step, seen: losses.append(float(seen["training/total_loss"])),
        )
    return Trained(losses)


check(train, optax.adam(1e-3), bound=0.5, axis_names=(), rtol=1e-5)
