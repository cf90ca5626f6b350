"""Small training tasks that fail, or suffer, without a clip, and one that does not.

A task is a few plain functions of arrays, so that seeds, learning rates and settings of a clip train side by side.
"""

import glob
import os
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Task(NamedTuple):
    """A task.

    Attributes:
      title: what it is, for the reader.
      init: key -> parameters, a dict in which "head" is the last layer.
      batch: key -> what one step learns from.
      loss: (parameters, batch) -> a number.
      evaluate: parameters -> what is reported, the lower the better.
      guess: what is reported of a model that knows only how often each answer is right.
      optimizer: learning rate -> transformation.
      rates: the learning rates.
      steps: the steps of a run.
    """

    title: str
    init: Callable[[jax.Array], Any]
    batch: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    evaluate: Callable[[Any], jax.Array]
    guess: float
    optimizer: Callable[[jax.Array], optax.GradientTransformation]
    rates: tuple[float, ...]
    steps: int


def momentum(rate):
    """SGD with momentum."""
    return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(rate))


def normal(key, *shape, gain=1.0):
    """Weights of variance gain² / fan-in."""
    return jax.random.normal(key, shape) * gain / np.prod(shape[:-1]) ** 0.5


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def entropy(labels):
    """The cross entropy of guessing by frequency."""
    share = np.bincount(labels.ravel()) / labels.size
    return -float(np.sum(share * np.log(np.where(share > 0, share, 1))))


class Text:
    """The source of Python's standard library in lower case, and random windows of it."""

    def __init__(self, length, size=400_000):
        names = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
        text = b"".join(pathlib.Path(name).read_bytes() for name in names[:60])[:size].lower()
        letters, numbers = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
        cut = len(numbers) * 9 // 10
        self.length, self.letters, self.guess = length, len(letters), entropy(numbers)
        self.train, self.held_out = jnp.asarray(numbers[:cut], jnp.int32), jnp.asarray(numbers[cut:], jnp.int32)

    def windows(self, text, key, count):
        """What is read, and what comes next."""
        starts = jax.random.randint(key, (count, 1), 0, len(text) - self.length)
        rows = text[starts + jnp.arange(self.length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def evaluator(self, run):
        rows, labels = self.windows(self.held_out, jax.random.key(7), 64)
        return lambda params: cross_entropy(run(params, rows), labels)


def rnn(width=32, count=8) -> Task:
    text = Text(length=40)

    def init(key):
        a, b = jax.random.split(key)
        embed, head = normal(a, width, text.letters).T, normal(b, width, text.letters)
        return {"embed": embed, "recurrent": jnp.eye(width), "bias": jnp.zeros(width), "head": head}

    def run(params, rows):
        def cell(h, x):
            h = jax.nn.relu(x + h @ params["recurrent"] + params["bias"])
            return h, h

        inputs = jnp.swapaxes(params["embed"][rows], 0, 1)
        _, states = jax.lax.scan(cell, jnp.zeros_like(inputs[0]), inputs)
        return jnp.swapaxes(states, 0, 1) @ params["head"]

    return Task(
        title="Recurrent network of ReLUs on text, SGD with momentum",
        init=init,
        batch=lambda key: text.windows(text.train, key, count),
        loss=lambda params, batch: cross_entropy(run(params, batch[0]), batch[1]),
        evaluate=text.evaluator(run),
        guess=text.guess,
        optimizer=momentum,
        rates=(0.01, 0.03, 0.1, 0.3),
        steps=250,
    )


def transformer(width=32, count=8, bad=False) -> Task:
    text = Text(length=32)
    past = np.tril(np.ones((text.length, text.length), bool))

    def init(key):
        shapes = {"embed": (text.letters, width), "place": (text.length, width), "query": (width, 3 * width)}
        shapes |= {"mix": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        shapes |= {"head": (width, text.letters)}
        keys = jax.random.split(key, len(shapes))
        return {name: normal(k, *shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def run(params, rows):
        x = 5 * (params["embed"][rows] + params["place"])
        query, key, value = jnp.split(jax.nn.standardize(x) @ params["query"], 3, axis=-1)
        scores = jnp.where(past, query @ jnp.swapaxes(key, -1, -2) / width**0.5, -1e9)
        x = x + jax.nn.softmax(scores) @ value @ params["mix"]
        x = x + jax.nn.relu(jax.nn.standardize(x) @ params["up"]) @ params["down"]
        return jax.nn.standardize(x) @ params["head"]

    def batch(key):
        """Text; if bad, one batch in 40 is to be continued at random, and counts a thousand times."""
        rows, labels = text.windows(text.train, key, count)
        spoiled = bad & jax.random.bernoulli(jax.random.fold_in(key, 1), 1 / 40)
        noise = jax.random.randint(key, labels.shape, 0, text.letters)
        return rows, jnp.where(spoiled, noise, labels), jnp.where(spoiled, 1000.0, 1.0)

    return Task(
        title=f"Transformer of one layer on text, Adam{', one batch in 40 is bad' if bad else ''}",
        init=init,
        batch=batch,
        loss=lambda params, batch: cross_entropy(run(params, batch[0]), batch[1]) * batch[2],
        evaluate=text.evaluator(run),
        guess=text.guess,
        optimizer=optax.adam,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        steps=250,
    )


def bad_batches() -> Task:
    return transformer(bad=True)


def cnn(width=8, depth=12, count=16) -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    labels = jnp.asarray(data.target[order])
    tiles = data.images[order].reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4, 4, 4)
    tiles = jnp.asarray(tiles / 16, jnp.float32)

    def init(key):
        first, last, *rest = jax.random.split(key, depth + 2)
        blocks = {f"block {i}": normal(k, 9 * width, width, gain=2**0.5) for i, k in enumerate(rest)}
        return {"stem": normal(first, 4, width), "head": normal(last, width, 10)} | blocks

    def convolve(x, kernel):
        """3 x 3, as one product: convolutions with a kernel for each of many runs are slow on a CPU."""
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jnp.concatenate([padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)], -1) @ kernel

    def run(params, tiles):
        x = tiles @ params["stem"]
        for i in range(depth):
            x = x + convolve(jax.nn.relu(x), params[f"block {i}"])
        return x.mean((1, 2)) @ params["head"]

    def batch(key):
        picked = jax.random.randint(key, (count,), 0, 1400)
        return tiles[picked], labels[picked]

    return Task(
        title="Residual convolutional network without normalisers on digits, SGD with momentum",
        init=init,
        batch=batch,
        loss=lambda params, batch: cross_entropy(run(params, batch[0]), batch[1]),
        evaluate=lambda params: cross_entropy(run(params, tiles[1400:]), labels[1400:]),
        guess=entropy(data.target),
        optimizer=momentum,
        rates=(0.003, 0.01, 0.03, 0.1),
        steps=200,
    )


def policy_gradient(width=16, episodes=16, horizon=200) -> Task:
    def init(key):
        a, b = jax.random.split(key)
        return {"hidden": normal(a, 4, width, gain=2.0), "head": normal(b, width, 1, gain=0.1)}

    def policy(params, states):
        return (jnp.tanh(states @ params["hidden"]) @ params["head"])[..., 0]

    def move(states, right):
        """20 ms of a cart of 1 kg with a pole of 0.1 kg on it, its middle at 0.5 m: Barto, Sutton and Anderson."""
        _, speed, angle, spin = states.T
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        thrust = (jnp.where(right, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
        twist = (9.8 * sine - cosine * thrust) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        return states + 0.02 * jnp.stack([speed, thrust - 0.05 * twist * cosine / 1.1, spin, twist], -1)

    def play(params, chances):
        """Episodes side by side: states, choices and whether the pole still stood, (time, episode, ...)."""
        starts, chances = chances

        def step(carry, chance):
            states, up = carry
            right = chance < jax.nn.sigmoid(policy(params, states))
            after = move(states, right)
            return (after, up & (jnp.abs(after[:, 0]) < 2.4) & (jnp.abs(after[:, 2]) < 0.21)), (states, right, up)

        return jax.lax.scan(step, (starts, jnp.ones(len(starts), bool)), chances)[1]

    def batch(key, count=episodes):
        a, b = jax.random.split(key)
        return jax.random.uniform(a, (count, 4), minval=-0.05, maxval=0.05), jax.random.uniform(b, (horizon, count))

    def loss(params, batch):
        """REINFORCE with rewards to go, no baseline."""
        states, right, up = play(jax.lax.stop_gradient(params), batch)
        to_go = jnp.cumsum(up[::-1], axis=0)[::-1]
        chosen = jax.nn.log_sigmoid(jnp.where(right, 1, -1) * policy(params, states))
        return -jnp.sum(chosen * to_go * up) / episodes

    def evaluate(params):
        return horizon - play(params, batch(jax.random.key(7), 64))[2].sum(0).mean()

    title = "Policy gradient on CartPole, SGD with momentum; steps lost of 200"
    return Task(title, init, batch, loss, evaluate, 178.0, momentum, (1e-5, 1e-4, 1e-3, 1e-2), 120)


TASKS = {make.__name__: make for make in (rnn, cnn, bad_batches, policy_gradient, transformer)}
