"""Sums over leaves in one read of the gradients, in the form that suits each compiler.

For blocks of leaves and layers a form takes a norm, a layout, the leaves and scales, and returns
`(S, P)` pools of P parts at S scales, and one leaf of each part. A part is a leaf, or several alike
leaves of one block; a leaf that stacks layers has one part per layer, in order. For units it
returns the pieces of each array of norms: at each scale an array `(*one entry per unit)` for one
leaf, or for several leaves with a leading axis.

Measured with XLA's own compilers, GPT-2 small before AdamW (150 kernels without a clip):

                         H100 kernels, by tree, by leaf   TPU v5e 4x4, cycles beside Optax's clip
    a sum a leaf         350, 444                         1.00
    plain                                                 0.94
    variadic             51, 53
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.base import Norm
from optaxclip.compat import varying_axes
from optaxclip.xla.layout import Layout, chunks, group, same_types
from optaxclip.xla.widths import times, widen

# XLA:GPU may copy a stack of more leaves: a kernel takes about 90 operands.
STACKED = 64
# With more leaves in one fusion compiling gets no faster.
ADDENDS = 64
# Smaller alike leaves are stacked: XLA:CPU has an overhead per array, and copying so little is
# cheap.
SMALL, MOST = 4096, 256
# Each element of a stack takes as many selects, and reads as many arrays.
SELECTED, FEW = 8, 1 << 16

_REDUCE = {"sum": jnp.sum, "max": lambda x, **kw: jnp.max(x, initial=0, **kw)}
_MEET = {"sum": lax.add, "max": lax.max}

Pools = tuple[jax.Array, list[int]]
# Pools of units, split along the leaves of an array of norms: each piece has one array per scale,
# for several leaves, or for one leaf and then without the axis of leaves.
Pieces = list[list[jax.Array]]


def lifted(norm: Norm, x: jax.Array, scale) -> jax.Array:
    """What each number contributes at a scale, which is a power of two, so that nothing rounds."""
    if isinstance(scale, jax.Array):
        # In a loop over scales. Without the barrier XLA:CPU hoists the conversion out of the loop
        # and allocates a float32 copy of all narrow leaves. With one barrier for all leaves it
        # materializes the scale in the shape of a leaf.
        x, scale = lax.optimization_barrier((x, scale))
        return norm.lift(times(widen(x), scale))
    if scale == 1:
        return norm.lift(widen(x))
    x = times(widen(x), jnp.asarray(scale, widen(x).real.dtype))
    # For a single number XLA would rewrite (x s)^2 as x^2 s^2, and s^2 is out of range.
    return norm.lift(lax.optimization_barrier(x) if x.size == 1 else x)


def _together(norm: Norm, leaves: Sequence[jax.Array], scale) -> jax.Array:
    """Combines the contributions of alike leaves element by element, for one reduction of all."""
    met = lifted(norm, leaves[0], scale)
    for x in leaves[1:]:
        met = _MEET[norm.pool](met, lifted(norm, x, scale))
    return met


def _parts(layout: Layout, row: Sequence[int], addends: int) -> list[Sequence[int]]:
    """Splits a row into parts: leaves of one block, at most `addends` of them."""
    by_block = group([layout.blocks.index[leaf] for leaf in row])
    return [chunk for part in by_block for chunk in chunks([row[i] for i in part], addends)]


def plain(norm: Norm, layout: Layout, arrays, scales, dtype, *, stacked: bool = False) -> Pools:
    """A sum for each part and scale. XLA reads a part once for all scales.

    Args:
      norm, layout, arrays, scales, dtype: see above.
      stacked: whether to stack small alike leaves of several blocks.
    """
    pools, first = [], []

    def add(x, parts, axis):
        """Pools of one array, or of a stack of them."""
        sums = [_REDUCE[norm.pool](x(s), axis=axis).astype(dtype) for s in scales]
        pools.append([jnp.atleast_1d(of_scale).ravel() for of_scale in sums])
        first.extend(parts)

    for row in layout.rows:
        for same in same_types(layout, row, arrays):
            parts = _parts(layout, same, ADDENDS)
            small = not layout.kept(same[0]) and arrays[same[0]].size < SMALL
            if stacked and len(parts) > 1 and small:
                for chunk in chunks(same, MOST):
                    whole = jnp.stack([arrays[i].ravel() for i in chunk])
                    add(lambda s, x=whole: lifted(norm, x, s), chunk, 1)
                continue
            for part in parts:
                leaves = [arrays[i] for i in part]
                pooled = layout.axes_of(part[0])
                add(lambda s, xs=leaves: _together(norm, xs, s), part[:1], pooled)
    return _joined(pools, first, len(scales), dtype)


def stacking(norm: Norm, layout: Layout, arrays, scales, dtype) -> Pools:
    """Like `plain`, but stacks small alike leaves of several blocks and reduces them at once."""
    return plain(norm, layout, arrays, scales, dtype, stacked=True)


def variadic(norm: Norm, layout: Layout, arrays, scales, dtype) -> Pools:
    """Stacks alike leaves for one `lax.reduce` of all scales: one kernel where `plain` has many.

    A part is always a single leaf, even if leaves share a block. A clip of the whole tree then
    takes the same sums as a `watch` by leaf before it, and XLA computes them once.
    """

    def contribute(x: jax.Array) -> list[jax.Array]:
        return [lifted(norm, x, scale) for scale in scales]

    pools, first = [], []
    for leaves, sums in reduce_alike(contribute, norm.pool, layout, arrays, STACKED):
        pools.append([x.astype(dtype).ravel() for x in sums])
        first.extend(leaves)
    return _joined(pools, first, len(scales), dtype)


def reduce_alike(
    contribute: Callable[[jax.Array], list[jax.Array]], how: str, layout: Layout, arrays, most: int
) -> Iterator[tuple[Sequence[int], list[jax.Array]]]:
    """For each set of at most `most` leaves alike its leaves, and what each contributes, pooled.

    Each pool has an axis of leaves, and that of their layers.
    """
    for row in layout.rows:
        for same in same_types(layout, row, arrays):
            for leaves in chunks(same, most):
                whole = jnp.stack([arrays[i] for i in leaves])
                below = tuple(axis + 1 for axis in layout.axes_of(leaves[0]))
                yield leaves, _reduce(contribute(whole), _MEET[how], below)


def _reduce(operands: list[jax.Array], meet: Callable, axes: tuple[int, ...]) -> list[jax.Array]:
    def step(a, b):
        return tuple(map(meet, a, b))

    zeros = tuple(jnp.zeros((), x.dtype) for x in operands)
    return list(lax.reduce(tuple(operands), zeros, step, axes))


def _joined(pools, first: list[int], scales: int, dtype) -> Pools:
    """Joins all pools in one concatenation, as XLA:TPU runs each small operation as a kernel."""
    if not pools:
        return jnp.zeros((scales, 0), dtype), first
    joined = jnp.concatenate([x for at in zip(*pools, strict=True) for x in at])
    return joined.reshape(scales, -1), first


def units(norm: Norm, layout: Layout, arrays, scales, dtype, *, stacked: bool) -> list[Pieces]:
    """Sums along the axes of units, as pieces of each array of norms.

    Args:
      norm, layout, arrays, scales, dtype: as in `plain`.
      stacked: whether to stack alike leaves and reduce them at once. It is free on a GPU (62
        kernels instead of 473), but copies all gradients on a TPU or a CPU.
    """
    rows = [_units_of_row(norm, layout, row, arrays, scales, dtype, stacked) for row in layout.rows]
    # Finish the sums of all leaves first, or XLA:TPU stacks them one by one in three times as many
    # kernels.
    rows = _finished(rows)
    return [[piece for r in array for piece in rows[r]] for array in layout.arrays]


def _finished(rows: list[Pieces]) -> list[Pieces]:
    """The sums behind a barrier, one for each type: what leaves one varies as all that enters."""
    flat, structure = jax.tree.flatten(rows)
    for kind in dict.fromkeys(map(varying_axes, flat)):
        own = [i for i, x in enumerate(flat) if varying_axes(x) == kind]
        for i, x in zip(own, lax.optimization_barrier([flat[i] for i in own]), strict=True):
            flat[i] = x
    return structure.unflatten(flat)


def _units_of_row(norm, layout, row, arrays, scales, dtype, stacked) -> Pieces:
    axes, reduce = layout.axes_of(row[0]), _REDUCE[norm.pool]
    if stacked and not layout.span.axes and len(same_types(layout, row, arrays)) == 1:
        below, whole = tuple(axis + 1 for axis in axes), jnp.stack([arrays[i] for i in row])
        return [[reduce(lifted(norm, whole, s), axis=below).astype(dtype) for s in scales]]

    def pool(i, s):
        sums = reduce(lifted(norm, arrays[i], s), axis=axes).astype(dtype)
        return layout.span.pool_leaf(sums, i, norm.pool)

    return [[pool(i, s) for s in scales] for i in row]


def join(pieces: list[jax.Array], ndim: int) -> jax.Array:
    """The pieces of one array of norms at one scale as that array."""
    pieces = [x if x.ndim == ndim else x[None] for x in pieces]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def stack(pieces: list[jax.Array], ndim: int) -> jax.Array:
    """As `join`, but by selects if pieces are small and have no axis of leaves.

    XLA:TPU computes these where the array is read, and takes a kernel to give a vector one more
    axis.
    """
    if pieces[0].ndim == ndim or pieces[0].size > FEW:
        return join(pieces, ndim)

    def select(part):
        # Not of NumPy's: XLA:TPU reads a constant mask from memory.
        place = lax.broadcasted_iota(np.int32, (len(part), *part[0].shape), 0)
        met = jnp.broadcast_to(part[0], place.shape)
        for i, x in enumerate(part[1:], start=1):
            met = jnp.where(place == i, x, met)
        return met

    return join([select(part) for part in chunks(pieces, SELECTED)], ndim)
