"""Each leaf times the factor of its block, rounded once to its own dtype.

XLA fuses one multiply per leaf into the optimizer that follows: it takes no kernel of its own and
no copy of the gradients. A division, a select or a `cond` on the tree would not be fused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.base import Blocks
from optaxclip.xla.layout import Layout, chunks, per_leaf
from optaxclip.xla.widths import times, widen

# XLA:GPU fuses the whole optimizer update of leaves that read entries of one small vector into one
# kernel: 42 kernels for GPT-2 small, where AdamW without a clip has 150. At most eight leaves,
# because a kernel of 48 takes a third longer to compile and gains nothing.
SIBLINGS = 8
# Fewer leaves compile soon enough without a conditional.
_MANY = 128


@functools.partial(jax.jit, static_argnames=("layout", "zeros"), inline=True)
def scale(arrays: list[jax.Array], factors: Any, *, layout: Layout, zeros: bool) -> list[jax.Array]:
    """Each leaf times the factor of its block.

    Args:
      arrays: the leaves.
      factors: one per block, in the shape of the norms.
      layout: how leaves are grouped into blocks.
      zeros: whether a factor of 0 turns inf and NaN into exact zeros as well, which costs a select.
    """
    return [_scaled(x, f, zeros) for x, f in zip(arrays, spread(factors, layout), strict=True)]


def _scaled(x: jax.Array, factor: jax.Array, zeros: bool) -> jax.Array:
    out = times(widen(x, factor.dtype), factor)
    if zeros:
        out = jnp.where(factor == 0, jnp.zeros_like(out), out)
    return as_dtype_of(x, out)


def spread(values: Any, layout: Layout) -> list[jax.Array]:
    """For each leaf the value of its block, in a shape that broadcasts against the leaf."""
    forms = [functools.partial(form, layout=layout) for form in _choose_forms(layout.blocks)]
    cpu, gpu, other = forms
    return lax.platform_dependent(values, cpu=cpu, cuda=gpu, rocm=gpu, default=other)


def _choose_forms(blocks: Blocks) -> tuple[Callable, Callable, Callable]:
    """The forms for a CPU, for GPUs, and for all others."""
    if blocks.units:
        return _unit_entries, _held_unit_entries, _unit_entries
    if blocks.axes is not None:
        return _held_layer_entries, _held_layer_entries, _layer_entries
    if blocks.names is None:
        # For a single scalar the small vectors gain nothing on a CPU and cost 6 % of the cycles on
        # a TPU mesh.
        return _same_for_all, _own_entries, _same_for_all
    return functools.partial(_held_entries, hold=_hold_on_cpu), _held_entries, _direct_entries


def _same_for_all(value: jax.Array, layout: Layout) -> list[jax.Array]:
    return [value] * len(layout.shapes)


def _own_entries(value: jax.Array, layout: Layout) -> list[jax.Array]:
    """Broadcasts a scalar to small vectors behind barriers, with one entry for each leaf."""
    vectors = [
        [lax.optimization_barrier(jnp.full(len(part), value)) for part in chunks(row, SIBLINGS)]
        for row in layout.rows
    ]
    return per_leaf(layout.rows, lambda r, i: vectors[r][i // SIBLINGS][i % SIBLINGS])


def _unit_entries(values: list[jax.Array], layout: Layout) -> list[jax.Array]:
    return _entries(_split(values, layout), layout)


def _held_unit_entries(values: list[jax.Array], layout: Layout) -> list[jax.Array]:
    return _entries([lax.optimization_barrier(x) for x in _split(values, layout)], layout)


def _entries(rows: list[jax.Array], layout: Layout) -> list[jax.Array]:
    def entry(r, i):
        return jnp.expand_dims(rows[r][i], layout.axes_of(layout.rows[r][i]))

    return per_leaf(layout.rows, entry)


def _split(values: list[jax.Array], layout: Layout) -> list[jax.Array]:
    """Splits arrays of norms into rows."""
    rows: dict[int, jax.Array] = {}
    for numbers, array in zip(layout.arrays, values, strict=True):
        ends = np.cumsum([len(layout.rows[r]) for r in numbers], dtype=int)
        rows |= zip(numbers, jnp.split(array, ends[:-1]), strict=True)
    return [rows[r] for r in range(len(rows))]


def _hold(vectors: list[jax.Array]) -> list[jax.Array]:
    return [lax.optimization_barrier(x) for x in vectors]


def _hold_on_cpu(vectors: list[jax.Array]) -> list[jax.Array]:
    """As results of a conditional, if there are many.

    XLA:CPU drops barriers before it fuses. So it would read entries of one vector at as many places
    as there are leaves, in as many loops to compile. Loops that read what a conditional returns are
    equal, and compiled once: a thousand leaves in a third of the time.
    """
    if len(vectors) * SIBLINGS < _MANY:
        return _hold(vectors)
    one = jnp.all(jnp.concatenate(vectors) == 1)
    # Both branches give the same numbers and derivatives; of equal ones XLA would keep none.
    return lax.cond(one, lambda xs: [x * lax.stop_gradient(x) for x in xs], lambda xs: xs, vectors)


def _direct_entries(vector: jax.Array, layout: Layout) -> list[jax.Array]:
    return [vector[i] for i in layout.blocks.index]


def _held_entries(vector: jax.Array, layout: Layout, hold=_hold) -> list[jax.Array]:
    """The entry of each leaf, read from small vectors that `hold` keeps apart from their source.

    If entries were read directly from the vector of all blocks, XLA:CPU would copy the computation
    of that vector into the loop of every leaf. On a TPU direct reads take 6 % fewer cycles.
    """
    order = [layout.blocks.index[leaf] for row in layout.rows for leaf in row]
    in_order = order == list(range(len(layout.blocks.names or ())))
    inner = vector if in_order else vector[np.array(order, int)]
    ends = np.cumsum([len(part) for row in layout.rows for part in chunks(row, SIBLINGS)])
    held = iter(hold([inner[a:b] for a, b in itertools.pairwise([0, *ends])]))
    rows = [[next(held) for _ in chunks(row, SIBLINGS)] for row in layout.rows]
    return per_leaf(layout.rows, lambda r, i: rows[r][i // SIBLINGS][i % SIBLINGS])


def _layer_entries(vector: jax.Array, layout: Layout) -> list[jax.Array]:
    """For each leaf the entries of the layers that it stacks, or its single entry."""
    number = _number_copies(layout)
    vectors = [vector] * (max(number, default=0) + 1)
    if len(vectors) > 1:
        # All in one barrier, because XLA merges equal ones.
        vectors = lax.optimization_barrier(vectors)

    def entries(r, i):
        leaf = layout.rows[r][i]
        own = layout.own_layers(vectors[number[r]], leaf).reshape(layout.kept(leaf))
        return jnp.expand_dims(own, layout.axes_of(leaf))

    return per_leaf(layout.rows, entries)


def _number_copies(layout: Layout) -> list[int]:
    """Which copy of the factors each row reads: rows of one shape read one block from their own.

    Such rows may be cut in different ways, as `q` and `o` are. From one vector XLA broadcasts the
    factors of layers once for both, and moves the result between devices: on 512 chips that took
    25 % more cycles, and a fifth of the gradients in temporaries.
    """
    taken: dict[Any, int] = {}
    numbers = []
    for row in layout.rows:
        keys = [(layout.shapes[leaf], layout.blocks.index[leaf]) for leaf in row]
        numbers.append(max(taken.get(key, 0) for key in keys))
        taken |= dict.fromkeys(keys, numbers[-1] + 1)
    return numbers


def _held_layer_entries(vector: jax.Array, layout: Layout) -> list[jax.Array]:
    # One barrier for all: few leaves are alike in models that stack their layers, and behind a
    # barrier of its own each slice takes a kernel on a GPU.
    return _layer_entries(lax.optimization_barrier(vector), layout)


def as_dtype_of(x: jax.Array, out: jax.Array) -> jax.Array:
    """`out` in the dtype of `x`, weak type included."""
    if (out.dtype, x.dtype) == (jnp.float32, jnp.bfloat16):
        out = _bfloat16(out)
    out = out.astype(x.dtype)
    # Arrays of NumPy's have no such type.
    return x.at[...].set(out) if getattr(x, "weak_type", False) else out


@jax.custom_jvp
def _bfloat16(x: jax.Array) -> jax.Array:
    # Before AdamW on a CPU a plain conversion costs 6 bytes per parameter, rounding in integers 2.
    # On a TPU the integer form would double the compile time.
    return lax.platform_dependent(
        x, cpu=_round_in_integers, default=lambda x: x.astype(jnp.bfloat16)
    )


@_bfloat16.defjvp
def _bfloat16_jvp(primals, tangents):
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _round_in_integers(x: jax.Array) -> jax.Array:
    """A float32 rounded to bfloat16, ties to even, in whole numbers.

    XLA:CPU treats a float conversion as expensive, and keeps a converted copy of all gradients
    instead of repeating it in each loop of the optimizer. It does repeat shifts and additions.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + jnp.uint32(0x7FFF) + (bits >> 16 & jnp.uint32(1))) >> 16
    # Rounding could turn the bits of a NaN into those of infinity.
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), upper)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
