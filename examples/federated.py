"""Federated learning: each client's update is clipped to the median norm, then noise is added.

    uv run examples/federated.py

A hundred clients hold fourteen handwritten digits each, mostly of two kinds, and send how a few
steps on them changed the model. For privacy the server clips each update to a bound C and adds
noise in proportion to C to the sum. Which C? Updates shrink as the model learns, and looking at
their norms costs privacy. In the method of Andrew et al. (2021) each client also sends one bit,
whether its update was within C, and C follows the median of the norms from a noisy count of these
bits, wherever it starts. Nobody has to choose it. Plain JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optaxclip
from comparison import Goal, Task, compare, parse_options
from data import load_digits
from optaxclip import per_example

CLIENTS, SENT, LOCAL_STEPS, LOCAL_RATE = 100, 20, 5, 0.3
NOISE = 0.5  # standard deviation of the noise on the sum, relative to the bound

# name -> the first bound, and whether it follows the median
METHODS = {
    "no clip, no noise": (np.inf, False),
    "bound 0.1": (0.1, False),
    "bound 1": (1.0, False),
    "bound 10": (10.0, False),
    "median, from 10": (10.0, True),
}


def split_among_clients(train):
    """Sorts the data by digit and gives each client two of 200 pieces: (clients, examples, ...)."""
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


def predict(params, pixels):
    return jnp.tanh(pixels @ params["in"]) @ params["out"]


def loss_fn(params, pixels, labels):
    logits = predict(params, pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_locally(params, pixels, labels):
    """Returns what a client sends: how a few steps on its own data change the parameters."""

    def step(_, new):
        grads = jax.grad(loss_fn)(new, pixels, labels)
        return jax.tree.map(lambda p, g: p - LOCAL_RATE * g, new, grads)

    return jax.tree.map(jnp.subtract, lax.fori_loop(0, LOCAL_STEPS, step, params), params)


def make_task(start, follow, train, held_out):
    """Runs rounds of federated averaging. The learning rate is that of the server."""
    pixels, labels = split_among_clients(train)
    median = per_example.private_quantile(0.5, init=start, batch_size=SENT)

    def init(rate, key):
        return init_params(key), median.init(key)

    def step(rate, state, key):
        params, tracked = state
        bound = tracked.bound
        who, noise = jax.random.split(key)
        chosen = jax.random.choice(who, CLIENTS, (SENT,), replace=False)
        sent = jax.vmap(train_locally, (None, 0, 0))(params, pixels[chosen], labels[chosen])
        total, clipped = optaxclip.per_example_global_norm_clip(sent, bound)
        norms = jax.vmap(optax.tree.norm)(sent)
        # Without a clip no noise would hide a client, so there is none.
        scale = NOISE * bound if np.isfinite(start) else 0.0
        drawn = optax.tree.random_like(noise, total)
        total = jax.tree.map(lambda t, n: t + scale * n, total, drawn)
        params = jax.tree.map(lambda p, t: p + rate * t / SENT, params, total)
        if follow:  # through a noisy count of the norms within the bound
            tracked = median.update(norms, tracked)
        return (params, tracked), report_clip(norms, bound, clipped)

    def evaluate(state):
        images, labels = held_out
        return jnp.mean(jnp.argmax(predict(state[0], images.reshape(-1, 64)), -1) == labels)

    return Task(init, step, evaluate)


def report_clip(norms, bound, clipped):
    """Reports to the table. A server that keeps its promise would not look at the norms."""
    norm = jnp.median(norms)
    seen = {"clip/grad_norm": norm, "clip/bound": bound, "clip/clipped": norm > bound}
    return seen | {"share clipped": clipped / SENT}


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=200, rates=(0.3, 1.0, 3.0))
    goal = Goal("Accuracy on digits never seen", failed=0.5, higher=True)
    data = load_digits()
    tasks = {name: make_task(*method, *data) for name, method in METHODS.items()}
    return compare(tasks, goal, args)


if __name__ == "__main__":
    main()
