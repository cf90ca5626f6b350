"""Federated learning: clients' updates clipped to their median length, then noise for all.

    uv run examples/federated.py

A hundred clients hold fourteen handwritten digits each, of two kinds or so, and send what a few
steps on them changed. For privacy the server clips each update to a bound C and adds noise in
proportion to C to their sum. Which C? Updates shrink as the model learns, and to look at them costs
privacy. Andrew et al. (2021) have each client also send one bit, whether its update was within C,
and move it: C ← C · exp(-0.2 · (share within - 0.5)), the share with noise of its own. Wherever it
starts, C comes to rest at the median; nobody chooses it. Plain JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optaxclip
from comparison import Goal, Task, compare, options
from data import digits

CLIENTS, SENT, LOCAL_STEPS, LOCAL_RATE = 100, 20, 5, 0.3
NOISE = 0.5  # standard deviation of the noise on the sum, in bounds

# name -> the bound at the start, and whether it follows the median
METHODS = {
    "no clip, no noise": (jnp.inf, False),
    "bound 0.1": (0.1, False),
    "bound 1": (1.0, False),
    "bound 10": (10.0, False),
    "median, from 10": (10.0, True),
}


def clients_of(train):
    """The data as (clients, examples, ...): sorted by digit, cut into 200 pieces, two for each
    client.
    """
    images, labels = train
    by_digit = np.argsort(labels, kind="stable").reshape(2 * CLIENTS, -1)
    pieces = by_digit[np.random.default_rng(0).permutation(2 * CLIENTS)].reshape(CLIENTS, -1)
    return images[pieces].reshape(*pieces.shape, 64), labels[pieces]


def init_params(key):
    a, b = jax.random.split(key)
    return {
        "in": jax.random.normal(a, (64, 32)) / 8,
        "out": jax.random.normal(b, (32, 10)) / 32**0.5,
    }


def logits_of(params, pixels):
    return jnp.tanh(pixels @ params["in"]) @ params["out"]


def local_update(params, pixels, labels):
    """What a client sends: how a few steps on its own data change the parameters."""

    def loss_of(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_of(params, pixels), labels
        ).mean()

    def step(_, new):
        return jax.tree.map(lambda p, g: p - LOCAL_RATE * g, new, jax.grad(loss_of)(new))

    return jax.tree.map(jnp.subtract, lax.fori_loop(0, LOCAL_STEPS, step, params), params)


def task(start, follow, train, held_out):
    """Rounds of federated averaging; the rate is the server's."""
    pixels, labels = clients_of(train)

    def init(rate, key):
        return init_params(key), jnp.asarray(start)

    def step(rate, state, key):
        params, bound = state
        who, noise, coin = jax.random.split(key, 3)
        chosen = jax.random.choice(who, CLIENTS, (SENT,), replace=False)
        sent = jax.vmap(local_update, (None, 0, 0))(params, pixels[chosen], labels[chosen])
        total, clipped = optaxclip.per_example_global_norm_clip(sent, bound)
        deviation = jnp.where(
            jnp.isfinite(bound), NOISE * bound, 0
        )  # without a bound no noise would do: there is none
        total = jax.tree.map(
            lambda t, n: t + deviation * n, total, optax.tree.random_like(noise, total)
        )
        params = jax.tree.map(lambda p, t: p + rate * t / SENT, params, total)
        within = 1 - clipped / SENT + jax.random.normal(coin) / 20
        moved = bound * jnp.exp(-0.2 * (within - 0.5)) if follow else bound
        return (params, moved), seen(sent, bound, clipped / SENT)

    def evaluate(state):
        images, labels = held_out
        return jnp.mean(jnp.argmax(logits_of(state[0], images.reshape(-1, 64)), -1) == labels)

    return Task(init, step, evaluate)


def seen(sent, bound, share):
    """For table and picture; a server that keeps its promises would not look at the median of the
    norms.
    """
    norms = jax.vmap(optax.tree.norm)(sent)
    middle = jnp.median(norms)
    return {
        "clip/grad_norm": middle,
        "clip/bound": bound,
        "clip/clipped": middle > bound,
        "share clipped": share,
    }


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=200, rates=(0.3, 1.0, 3.0))
    goal = Goal(
        "Accuracy on digits never seen",
        failed=0.5,
        higher=True,
    )
    data = digits()
    return compare({name: task(*method, *data) for name, method in METHODS.items()}, goal, args)


if __name__ == "__main__":
    main()
