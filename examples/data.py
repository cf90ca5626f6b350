"""Data that every machine has: the source of Python's library, and scikit-learn's digits."""

import glob
import os
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

LETTERS = 128


def library_text(size=1_000_000):
    """A megabyte of the standard library's source, as numbers from 0 to 127: to train on, and a
    tenth not to.
    """
    names = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    text = b"".join(pathlib.Path(name).read_bytes() for name in names)
    numbers = jnp.asarray(np.frombuffer(text[:size], np.uint8) & (LETTERS - 1))
    return numbers[: len(numbers) * 9 // 10], numbers[len(numbers) * 9 // 10 :]


def windows(text, key, count, length):
    """Random windows of a text, (count, length + 1)."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length)
    return text[starts + jnp.arange(length + 1)].astype(jnp.int32)


def digits(train=1400):
    """Pixels from 0 to 1, (n, 8, 8), and labels, in an order of their own: to train on, and 397 not
    to.
    """
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, labels = (
        jnp.asarray(data.images[order] / 16, jnp.float32),
        jnp.asarray(data.target[order]),
    )
    return (images[:train], labels[:train]), (images[train:], labels[train:])
