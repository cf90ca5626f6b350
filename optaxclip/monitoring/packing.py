"""Many small numbers as few arrays: on a GPU every array of a state is a kernel, however small."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Packed = dict[str, jax.Array]


# Compiled, as are those below: where nothing around them is, each slice would be a call of its own.
@functools.partial(jax.jit, inline=True)
def pack(tree: Any) -> Packed:
    """The numbers of a tree as one vector for each dtype, in the order of the leaves."""
    vectors: dict[str, list[jax.Array]] = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        vectors.setdefault(str(x.dtype), []).append(x.ravel())
    return {name: jnp.concatenate(parts) for name, parts in vectors.items()}


@functools.partial(jax.jit, static_argnames="like", inline=True)
def unpack(packed: Packed, like: Any) -> Any:
    """The tree that was packed, or the first part of it, given the shapes of its leaves.

    Axes before that of a vector, as `vmap` adds them, come before those of each leaf.
    """
    leaves, structure = jax.tree.flatten(like)
    read, starts = [], dict.fromkeys(packed, 0)
    for x in leaves:
        name = str(x.dtype)
        start, vector = starts[name], packed[name]
        starts[name] = stop = start + x.size
        read.append(vector[..., start:stop].reshape(vector.shape[:-1] + x.shape))
    return structure.unflatten(read)
