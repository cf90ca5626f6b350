"""Many small numbers as one array: on a GPU every array of a state is a kernel, however small."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Packed = dict[str, jax.Array]


# Compiled, as are those below: where nothing around them is, each slice would be a call of its own.
@functools.partial(jax.jit, inline=True)
def pack(tree: Any) -> Packed:
    """The numbers of a tree as one vector for each dtype, in the order of the leaves.

    The bits of float32 numbers lie among the int32: a second array is two kernels more, its update
    and, since it is donated and read out of order, a copy of it.
    """
    vectors: dict[str, list[jax.Array]] = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        if x.dtype == jnp.float32:
            x = lax.bitcast_convert_type(x, jnp.int32)
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
        floats = x.dtype == jnp.float32
        name = "int32" if floats else str(x.dtype)
        start, vector = starts[name], packed[name]
        starts[name] = stop = start + x.size
        x = vector[..., start:stop].reshape(vector.shape[:-1] + x.shape)
        read.append(lax.bitcast_convert_type(x, jnp.float32) if floats else x)
    return structure.unflatten(read)
