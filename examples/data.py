"""Data that every machine has: the source of Python's library, and scikit-learn's digits."""

import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

LETTERS = 128


def load_text(size=1_000_000):
    """Loads a megabyte of Python's own source as numbers from 0 to 127. A tenth is held out."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    numbers = jnp.asarray(np.frombuffer(text[:size], np.uint8) & (LETTERS - 1))
    train = len(numbers) * 9 // 10
    return numbers[:train], numbers[train:]


def sample_windows(text, key, count, length):
    """Samples random windows of a text, (count, length + 1)."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length)
    return text[starts + jnp.arange(length + 1)].astype(jnp.int32)


def load_digits(train=1400):
    """Loads (images, labels) to train on and 397 more to evaluate on. Images are (n, 8, 8)."""
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jnp.asarray(data.images[order] / 16, jnp.float32)
    labels = jnp.asarray(data.target[order])
    return (images[:train], labels[:train]), (images[train:], labels[train:])
