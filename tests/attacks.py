"""Two of eight clients attack a logistic regression: how well each aggregation withstands them.

    python -m tests.attacks

prints the table of docs/distributed.md.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip.aggregation import centered_clip, clip21_sgd2m, clipped_mean
from optaxclip.compat import to_varying

AXIS, CLIENTS, LIARS = "clients", 8, 2
SIZE, EXAMPLES, BATCH, STEPS, RATE = 10, 256, 8, 300, 0.5


def _momentum_first(clip):
    return optax.chain(optax.ema(0.9, debias=False), clip)


BOUND = oc.clip_by_global_norm(0.1)
METHODS = {
    "pmean": optax.stateless(lambda updates, params: lax.pmean(updates, AXIS)),
    "mean, by value": clipped_mean(_momentum_first(oc.clip(0.03)), AXIS),
    "mean, by norm": clipped_mean(_momentum_first(BOUND), AXIS),
    "centered": centered_clip(BOUND, AXIS),
    "centered, no momentum": centered_clip(BOUND, AXIS, momentum=0.0),
    "Clip21": clip21_sgd2m(BOUND, AXIS),
}
# What an attacker sends, given its own gradient and the mean and deviation of the honest ones.
ATTACKS = {
    "none": lambda own, mean, deviation: own,
    "sign flip": lambda own, mean, deviation: -10 * own,
    "scaled": lambda own, mean, deviation: 1e30 * own,
    "NaN": lambda own, mean, deviation: jnp.full_like(own, jnp.nan),
    "a little is enough": lambda own, mean, deviation: mean - 1.5 * deviation,  # Baruch et al. 2019
    "inner product": lambda own, mean, deviation: -4 * mean,  # Xie et al. 2020
}


def draw_data():
    """The data of each client, (clients, examples, size), and the labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(CLIENTS, EXAMPLES, SIZE))
    noise = 0.3 * rng.normal(size=(CLIENTS, EXAMPLES))
    return jnp.float32(x), jnp.float32(x @ (2 * rng.normal(size=SIZE)) + noise > 0)


def loss_of(w, x, y):
    return optax.sigmoid_binary_cross_entropy(x @ w, y).mean()


def say(attack, own):
    """The message of this client; attackers know those of all honest clients."""
    liar = lax.axis_index(AXIS) < LIARS

    def average(x):
        return lax.psum(jnp.where(liar, 0, x), AXIS) / (CLIENTS - LIARS)

    mean = average(own)
    deviation = jnp.sqrt(average((own - mean) ** 2))
    lies = jnp.stack([lie(own, mean, deviation) for lie in ATTACKS.values()])
    return jnp.where(liar, lies[attack], own)


def train(tx, attack, x, y):
    """The parameters after training, as one of the devices computes them."""

    def step(carry, key):
        w, state = carry
        picked = jax.random.randint(
            jax.random.fold_in(key, lax.axis_index(AXIS)), (BATCH,), 0, EXAMPLES
        )
        grad = jax.grad(loss_of)(to_varying(w, [AXIS]), x[0, picked], y[0, picked])
        out, state = tx.update(say(attack, grad), state)
        return (w - RATE * out, state), None

    w = jnp.zeros(SIZE)
    keys = jax.random.split(jax.random.key(0), STEPS)
    return lax.scan(step, (w, tx.init(w)), keys)[0][0]


def losses(method):
    """The loss of honest clients after each attack, by name."""
    mesh, (x, y) = Mesh(jax.devices()[:CLIENTS], AXIS), draw_data()
    specs = {"in_specs": (P(), P(AXIS), P(AXIS)), "out_specs": P()}
    run = jax.jit(jax.shard_map(partial(train, METHODS[method]), mesh=mesh, **specs))
    honest = x[LIARS:].reshape(-1, SIZE), y[LIARS:].reshape(-1)
    return {name: float(loss_of(run(i, x, y), *honest)) for i, name in enumerate(ATTACKS)}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", CLIENTS)
    print("| |", " | ".join(ATTACKS), "|")
    print("|---|" + "---|" * len(ATTACKS))
    for method in METHODS:
        print(f"| {method} |", " | ".join(f"{x:.3g}" for x in losses(method).values()), "|")
