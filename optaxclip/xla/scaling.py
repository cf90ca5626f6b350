"""Each leaf times the factor of its block, rounded once to its own dtype.

One multiply a leaf is the form that XLA fuses into the optimizer that follows: no kernel of its own, no
copy of the gradients. A division, a select or a `cond` on the tree is not fused.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.xla.layout import Layout, chunks, per_leaf
from optaxclip.xla.widths import times, widen

# Leaves alike that read entries of one small vector are siblings to XLA:GPU, which makes one kernel of
# their whole optimizer update: 42 kernels for GPT-2 small, where AdamW without a clip has 150. Eight, as one
# kernel of 48 leaves compiles a third longer and gains nothing.
SIBLINGS = 8


@functools.partial(jax.jit, static_argnames=("layout", "zeros"), inline=True)
def scale(arrays: list[jax.Array], factors: Any, *, layout: Layout, zeros: bool) -> list[jax.Array]:
    """Each leaf times the factor of its block.

    Args:
      arrays: the leaves.
      factors: one a block, in the shape of the norms.
      layout: how leaves lie in blocks.
      zeros: whether a factor of 0 makes exact zeros also of inf and NaN, which costs a select.
    """
    return [_scaled(x, f, zeros) for x, f in zip(arrays, spread(factors, layout), strict=True)]


def _scaled(x: jax.Array, factor: jax.Array, zeros: bool) -> jax.Array:
    out = times(widen(x), factor)
    if zeros:
        out = jnp.where(factor == 0, jnp.zeros_like(out), out)
    return as_dtype_of(x, out)


def spread(values: Any, layout: Layout) -> list[jax.Array]:
    """One value a block, in a shape that broadcasts against each leaf of the block."""
    blocks, rows = layout.blocks, layout.rows
    if blocks.axes is not None:
        held = [lax.optimization_barrier(row) for row in values]
        return per_leaf(rows, lambda r, i: held[r][i])
    if blocks.names is not None:
        held = functools.partial(_held_entries, layout=layout)
        return lax.platform_dependent(
            values, cpu=held, cuda=held, rocm=held, default=lambda vector: [vector[i] for i in blocks.index]
        )

    def own_entries(value):
        vectors = [[lax.optimization_barrier(jnp.full(len(c), value)) for c in chunks(row, SIBLINGS)] for row in rows]
        return per_leaf(rows, lambda r, i: vectors[r][i // SIBLINGS][i % SIBLINGS])

    # Elsewhere the vectors gain nothing, and on a TPU mesh they cost 6 % of the cycles.
    return lax.platform_dependent(
        values, cuda=own_entries, rocm=own_entries, default=lambda value: [value] * len(layout.shapes)
    )


def _held_entries(vector: jax.Array, layout: Layout) -> list[jax.Array]:
    """The entry of each leaf, through small vectors behind barriers.

    An entry that is read straight from the vector of all blocks makes XLA:CPU copy what computes that vector into the
    loop of every leaf, and compile a thousand different ones. A TPU reads it so in 6 % fewer cycles.
    """
    order = [layout.blocks.index[leaf] for row in layout.rows for leaf in row]
    inner = vector if order == list(range(len(layout.blocks.names))) else vector[np.array(order, int)]
    starts, held = np.cumsum([0, *map(len, layout.rows)]), {}

    def entry(r, i):
        start = starts[r] + i - i % SIBLINGS
        if start not in held:
            held[start] = lax.optimization_barrier(inner[start : min(start + SIBLINGS, starts[r + 1])])
        return held[start][i % SIBLINGS]

    return per_leaf(layout.rows, entry)


def as_dtype_of(x: jax.Array, out: jax.Array) -> jax.Array:
    """`out` in the dtype of `x`, weak type included."""
    if (out.dtype, x.dtype) == (jnp.float32, jnp.bfloat16):
        out = _bfloat16(out)
    out = out.astype(x.dtype)
    return x.at[...].set(out) if x.weak_type else out


@jax.custom_jvp
def _bfloat16(x: jax.Array) -> jax.Array:
    # A conversion on a CPU costs +6 bytes a parameter before AdamW, this +2; on a TPU it doubles the compile time.
    return lax.platform_dependent(x, cpu=_round_in_integers, default=lambda x: x.astype(jnp.bfloat16))


@_bfloat16.defjvp
def _bfloat16_jvp(primals, tangents):
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _round_in_integers(x: jax.Array) -> jax.Array:
    """A float32 rounded to bfloat16, ties to even, in whole numbers.

    XLA:CPU treats a float conversion as expensive and keeps a copy of all gradients, rather than convert
    them in each loop of the optimizer that reads them. Shifts and additions it does repeat.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + jnp.uint32(0x7FFF) + (bits >> 16 & jnp.uint32(1))) >> 16
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), upper)  # whose bits might round to those of inf
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
