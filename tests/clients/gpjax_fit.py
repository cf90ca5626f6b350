# /// script
# dependencies = ["gpjax==1.0.0", "jax==0.10.2"]
# ///
"""gpjax: the hyperparameters of a Gaussian process, by its marginal likelihood."""

import gpjax as gpx
import jax.numpy as jnp
import optax

from tests.clients.common import Trained, check


def train(optimizer):
    x = jnp.linspace(0, 1, 50)[:, None]
    data = gpx.Dataset(X=x, y=jnp.sin(9 * x))
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF())
    _, losses = gpx.fit(
        model=prior * gpx.likelihoods.Gaussian(),
        objective=lambda p, d: -gpx.objectives.conjugate_mll(p, d),
        train_data=data,
        optim=optimizer,
        num_iters=50,
        verbose=False,
    )
    return Trained(losses)


check(train, optax.adam(0.05), bound=5.0)
