"""Contributions of leaves, pooled: one read of the gradients, in the form that each compiler likes.

For blocks of leaves and layers a form takes a norm, a layout, the leaves and scales, and returns
`(S, P)` pools of P parts at S scales, with a leaf of each part. A part is one leaf, or several
leaves alike of one block. (Of leaves that stack layers it is one part for each layer, behind one
another.) For units it returns, for each array of norms, its pieces: at each scale an array `(*one
entry per unit)` of one leaf, or of several with an axis of leaves before.

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
from jax import lax

from optaxclip.base import Norm
from optaxclip.xla.layout import Layout, chunks, group, same_types
from optaxclip.xla.widths import times, widen

# Of more leaves XLA:GPU may copy the stack: a kernel has room for about 90 operands.
STACKED = 64
# More leaves in one fusion compile no faster.
ADDENDS = 64
# Smaller leaves that are alike are stacked: XLA:CPU takes its time for every array, however small,
# and a copy of so little costs nothing.
SMALL, MOST = 4096, 256

_REDUCE = {"sum": jnp.sum, "max": lambda x, **kw: jnp.max(x, initial=0, **kw)}
_MEET = {"sum": lax.add, "max": lax.max}

Pools = tuple[jax.Array, list[int]]
# Pools of units, cut along the leaves of an array of norms: each piece has one array per scale, for
# several leaves or, without their axis, for one.
Pieces = list[list[jax.Array]]


def lifted(norm: Norm, x: jax.Array, scale) -> jax.Array:
    """What each number contributes, at a scale: a power of two, so that nothing is rounded."""
    if isinstance(scale, jax.Array):
        # In a loop over scales. Without the barrier XLA:CPU takes the conversion out of it, and
        # makes room for a float32 copy of all narrow leaves; with one barrier for all leaves it
        # keeps the scale in a leaf's shape.
        x, scale = lax.optimization_barrier((x, scale))
        return norm.lift(times(widen(x), scale))
    if scale == 1:
        return norm.lift(widen(x))
    x = times(widen(x), jnp.asarray(scale, widen(x).real.dtype))
    # Of a single number XLA would make (x s)^2 into x^2 s^2, and s^2 is no float.
    return norm.lift(lax.optimization_barrier(x) if x.size == 1 else x)


def _together(norm: Norm, leaves: Sequence[jax.Array], scale) -> jax.Array:
    """Contributions of leaves alike, met element by element: one reduction instead of many."""
    met = lifted(norm, leaves[0], scale)
    for x in leaves[1:]:
        met = _MEET[norm.pool](met, lifted(norm, x, scale))
    return met


def _parts(layout: Layout, row: Sequence[int], addends: int) -> list[Sequence[int]]:
    """A row as parts: leaves of one block, at most `addends` of them."""
    by_block = group([layout.blocks.index[leaf] for leaf in row])
    return [chunk for part in by_block for chunk in chunks([row[i] for i in part], addends)]


def plain(norm: Norm, layout: Layout, arrays, scales, dtype, *, stacked: bool = False) -> Pools:
    """A sum for each part and scale. XLA makes one read of the scales of a part.

    Args:
      norm, layout, arrays, scales, dtype: see above.
      stacked: whether to stack small leaves alike that are of several blocks.
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
    """As `plain`, but small leaves alike of several blocks are stacked, and reduced at once."""
    return plain(norm, layout, arrays, scales, dtype, stacked=True)


def variadic(norm: Norm, layout: Layout, arrays, scales, dtype) -> Pools:
    """Leaves alike stacked, and one `lax.reduce` of all scales: one kernel where `plain` has many.

    A part is one leaf, also where leaves share a block: so a clip of the whole tree has the sums of
    a `watch` by leaf before it, and XLA takes them once.
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
    """All pools in one concatenation: XLA:TPU runs each of these small operations as a kernel."""
    if not pools:
        return jnp.zeros((scales, 0), dtype), first
    joined = jnp.concatenate([x for at in zip(*pools, strict=True) for x in at])
    return joined.reshape(scales, -1), first


def units(norm: Norm, layout: Layout, arrays, scales, dtype, *, stacked: bool) -> list[Pieces]:
    """Sums along the axes of units, as pieces of each array of norms.

    Args:
      norm, layout, arrays, scales, dtype: as in `plain`.
      stacked: whether to stack leaves alike and reduce them at once: free on a GPU (62 kernels for
        473), a copy of all gradients on a TPU and a CPU.
    """
    rows = [_units_of_row(norm, layout, row, arrays, scales, dtype, stacked) for row in layout.rows]
    # Sums of all leaves first: else XLA:TPU stacks them one by one, in three times as many kernels.
    rows = lax.optimization_barrier(rows)
    return [[piece for r in array for piece in rows[r]] for array in layout.arrays]


def _units_of_row(norm, layout, row, arrays, scales, dtype, stacked) -> Pieces:
    axes, reduce = layout.axes_of(row[0]), _REDUCE[norm.pool]
    if stacked and not layout.span.axes and len(same_types(layout, row, arrays)) == 1:
        below, whole = tuple(axis + 1 for axis in axes), jnp.stack([arrays[i] for i in row])
        return [[reduce(lifted(norm, whole, s), axis=below).astype(dtype) for s in scales]]

    def pool(i, s):
        sums = reduce(lifted(norm, arrays[i], s), axis=axes).astype(dtype)
        return layout.span.pool_leaf(sums, i, norm.pool)

    return [[pool(i, s) for s in scales] for i in row]
