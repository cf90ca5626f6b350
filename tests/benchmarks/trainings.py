"""Small trainings that fail or suffer without a clip. Each takes seconds.

All are plain functions of arrays, so that one `vmap` runs many seeds, learning rates and settings
of a clip side by side.
"""

import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


class Training(NamedTuple):
    """A task.

    Attributes:
      name: its name in tables.
      init: key -> parameters.
      loss: (parameters, key, step, bad=...) -> the loss of the batch of a step, which may be bad.
      evaluate: parameters -> the score, lower is better.
      failed: a run whose score is higher has diverged.
      optimizer: learning rate -> transformation.
      rates: the learning rates.
      steps: the steps of a run.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    evaluate: Callable[[Any], jax.Array]
    failed: float
    optimizer: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    steps: int


LETTERS = 3.0  # nats per character of a model that knows only the frequency of each letter


def make_momentum(rate):
    """Makes SGD with momentum."""
    return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(rate))


def init_weights(key, *shape, gain=1.0):
    """Draws weights of variance gain² / fan-in."""
    return jax.random.normal(key, shape) * gain / np.prod(shape[:-1]) ** 0.5


def load_text(size=400_000) -> tuple[jax.Array, jax.Array]:
    """Loads Python's own source as numbers from 0 to 127. A tenth is held out."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files[:60])
    numbers = jnp.asarray(np.frombuffer(text[:size], np.uint8) & 127)
    return numbers[: size * 9 // 10], numbers[size * 9 // 10 :]


def sample_windows(text, key, count, length):
    """Samples random windows of a text: the characters to read, and the next ones."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length)
    rows = text[starts + jnp.arange(length + 1)].astype(jnp.int32)
    return rows[:, :-1], rows[:, 1:]


def compute_cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def spoil(labels, key, bad, kinds):
    """Returns the labels of a batch and the weight of its loss: noise and 1,000 if it is bad."""
    noise = jax.random.randint(key, labels.shape, 0, kinds).astype(labels.dtype)
    return jnp.where(bad, noise, labels), jnp.where(bad, 1000.0, 1.0)


def char_rnn(width=48, length=40, batch=8) -> Training:
    """A tanh recurrent network on text, initialized so that gradients can explode."""
    train, held_out = load_text()

    def init(key):
        a, b, c = jax.random.split(key, 3)
        recurrent = jax.nn.initializers.orthogonal(1.3)(a, (width, width))
        return {
            "in": init_weights(b, 128, width, gain=11.0),
            "recurrent": recurrent,
            "out": init_weights(c, width, 128),
        }

    def run(params, rows):
        def cell(h, x):
            h = jnp.tanh(params["in"][x] + h @ params["recurrent"])
            return h, h

        _, states = lax.scan(cell, jnp.zeros((len(rows), width)), rows.T)
        return jnp.swapaxes(states, 0, 1) @ params["out"]

    def loss(params, key, step, bad=False):
        rows, labels = sample_windows(train, key, batch, length)
        labels, weight = spoil(labels, key, bad, 128)
        return compute_cross_entropy(run(params, rows), labels) * weight

    def evaluate(params):
        rows, labels = sample_windows(held_out, jax.random.key(7), 64, length)
        return compute_cross_entropy(run(params, rows), labels)

    name, rates = "character RNN", (0.1, 0.3, 1.0)
    return Training(name, init, loss, evaluate, LETTERS, make_momentum, rates, 250)


def transformer(width=32, length=32, batch=8) -> Training:
    """One layer of a transformer on text, Adam; without `bad`, every 40th batch is bad."""
    train, held_out = load_text()
    causal = np.tril(np.ones((length, length), bool))

    def init(key):
        shapes = {"embed": (128, width), "place": (length, width), "qkv": (width, 3 * width)}
        shapes |= {"mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        shapes |= {"head": (width, 128)}
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {name: init_weights(keys[name], *shape) for name, shape in shapes.items()}

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def run(params, rows):
        x = 5.0 * (params["embed"][rows] + params["place"])
        q, k, v = jnp.split(norm(x) @ params["qkv"], 3, axis=-1)
        scores = jnp.where(causal, q @ jnp.swapaxes(k, -1, -2) / width**0.5, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ params["mix"]
        x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
        return norm(x) @ params["head"]

    def loss(params, key, step, bad=None):
        rows, labels = sample_windows(train, key, batch, length)
        labels, weight = spoil(labels, key, step % 40 == 20 if bad is None else bad, 128)
        return compute_cross_entropy(run(params, rows), labels) * weight

    def evaluate(params):
        rows, labels = sample_windows(held_out, jax.random.key(7), 64, length)
        return compute_cross_entropy(run(params, rows), labels)

    name, rates = "transformer, bad batches", (1e-3, 4e-3, 16e-3)
    return Training(name, init, loss, evaluate, LETTERS, optax.adam, rates, 200)


def digits_cnn(width=8, depth=5, batch=16) -> Training:
    """A residual convolutional network without normalization, on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jnp.asarray(data.images[order] / 16, jnp.float32)[..., None]
    labels = jnp.asarray(data.target[order])

    def init(key):
        first, *rest, last = jax.random.split(key, depth + 2)
        layers = [init_weights(k, 9 * width, width, gain=2.0) for k in rest]
        ends = {"first": init_weights(first, 9, width), "head": init_weights(last, width, 10)}
        return ends | {"layers": layers}

    def conv(x, kernel):
        """Convolves, 3 x 3, as one product: under `vmap` a convolution is slow on a CPU."""
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifts, -1) @ kernel

    def run(params, x):
        x = conv(x, params["first"])
        for kernel in params["layers"]:
            x = x + conv(jax.nn.relu(x), kernel)
        return x.mean((1, 2)) @ params["head"]

    def loss(params, key, step, bad=False):
        picked = jax.random.randint(key, (batch,), 0, 1400)
        spoiled, weight = spoil(labels[picked], key, bad, 10)
        return compute_cross_entropy(run(params, images[picked]), spoiled) * weight

    def evaluate(params):
        return compute_cross_entropy(run(params, images[1400:]), labels[1400:])

    name, rates = "normaliser-free CNN", (0.01, 0.03, 0.1)
    return Training(name, init, loss, evaluate, np.log(10), make_momentum, rates, 150)


def push_cart(state, right):
    """Pushes a cart (1 kg) with a pole (0.1 kg, 0.5 m to its middle) by 10 N for 20 ms."""
    _, speed, angle, spin = state
    force = jnp.where(right, 10.0, -10.0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    thrust = (force + 0.05 * spin**2 * sine) / 1.1
    twist = (9.8 * sine - cosine * thrust) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    pull = thrust - 0.05 * twist * cosine / 1.1
    return state + 0.02 * jnp.stack([speed, pull, spin, twist])


def cartpole(width=32, episodes=8, horizon=200) -> Training:
    """REINFORCE on CartPole without a baseline. Gradients grow with the time the pole stood."""

    def init(key):
        a, b = jax.random.split(key)
        return {"in": init_weights(a, 4, width), "out": init_weights(b, width, 2, gain=0.1)}

    def play(params, key):
        """Plays an episode: the log-probability of each action, and whether the pole stood."""

        def step(carry, key):
            state, up = carry
            logits = jnp.tanh(state @ params["in"]) @ params["out"]
            push = jax.random.categorical(key, logits)
            state = lax.stop_gradient(push_cart(state, push == 1))
            still = up & (jnp.abs(state[0]) < 2.4) & (jnp.abs(state[2]) < 0.21)
            return (state, still), (jax.nn.log_softmax(logits)[push], up)

        keys = jax.random.split(key, horizon + 1)
        state = jax.random.uniform(keys[0], (4,), minval=-0.05, maxval=0.05)
        _, (log_probs, up) = lax.scan(step, (state, jnp.array(True)), keys[1:])
        return log_probs, up.astype(jnp.float32)

    def loss(params, key, step, bad=False):
        log_probs, up = jax.vmap(play, (None, 0))(params, jax.random.split(key, episodes))
        to_go = jnp.cumsum(up[:, ::-1], axis=1)[:, ::-1]
        to_go, weight = spoil(to_go, key, bad, horizon)
        return -jnp.sum(log_probs * up * to_go) / episodes * weight

    def evaluate(params):
        _, up = jax.vmap(play, (None, 0))(params, jax.random.split(jax.random.key(7), 16))
        return 1 - up.mean()

    name, rates = "policy gradient", (1e-5, 1e-4, 1e-3)
    return Training(name, init, loss, evaluate, 0.9, make_momentum, rates, 120)


TRAININGS = {make.__name__: make for make in (char_rnn, transformer, digits_cnn, cartpole)}
