"""Scanning a batch, a few examples at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.xla import widen


def scan_microbatches(step, batch, given: jax.Array, at_once: int | None, like: Any):
    """Adds up the first results of `step` over microbatches, and joins the others in order.

    The sums have the structure and shapes of `like`, and are in float32 at least.

    The k-th of n microbatches takes the examples k, k + n, k + 2n, ... The last ones are padded
    with the last example, at weight 0.
    """
    size = given.size
    count = -(-size // min(at_once or size, size))
    at_once = -(-size // count)
    if count == 1:
        return step(batch, given)
    missing = at_once * count - size

    # Not the examples from k·m to (k + 1)·m: if the batch is sharded over devices, each microbatch
    # would be on one device while the others wait.
    def cut(x):
        return x.reshape(at_once, count, *x.shape[1:]).swapaxes(0, 1)

    def fill(x):
        return x[np.minimum(np.arange(size + missing), size - 1)] if missing else x

    def join(x):
        return x.swapaxes(0, 1).reshape(size + missing, *x.shape[2:])[:size]

    def add(sums, chunk):
        more, each = step(*chunk)
        return jax.tree.map(jnp.add, sums, more), each

    zeros = jax.tree.map(lambda x: jnp.zeros_like(widen(x)), like)
    chunks = jax.tree.map(lambda x: cut(fill(x)), batch), cut(jnp.pad(given, (0, missing)))
    sums, each = lax.scan(add, zeros, chunks)
    return sums, jax.tree.map(join, each)
