"""Sums over leaves in one read of the gradients, in the form that suits each compiler.

For blocks of leaves and layers a form takes a norm, a layout, the leaves and scales, and returns
`(S, P)` pools of P parts at S scales, and one leaf of each part. A part is a leaf, or several alike
leaves of one block; a leaf that stacks layers has one part per layer, in order.

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
from optaxclip.xla.widths import largest, times, widen

# XLA:GPU may copy a stack of more leaves: a kernel takes about 90 operands.
STACKED = 64
# With more leaves in one fusion compiling gets no faster.
ADDENDS = 64
# Smaller alike leaves are stacked: XLA:CPU has an overhead per array, and copying so little is
# cheap.
SMALL, MOST = 4096, 256
# Larger leaves are summed one by one on a CPU: a loop that reads twelve of them at once takes a
# fifth longer.
LARGE = 2**16

REDUCE = {"sum": jnp.sum, "max": largest}
_MEET = {"sum": lax.add, "max": lax.max}

Pools = tuple[jax.Array, list[int]]


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
      stacked: whether to stack small alike leaves of several blocks, and to sum large ones one by
        one.
    """
    pools, owners = [], []

    def add(x, parts, axis):
        """Pools of one array, or of a stack of them."""
        sums = [REDUCE[norm.pool](x(s), axis=axis).astype(dtype) for s in scales]
        pools.append([jnp.atleast_1d(of_scale).ravel() for of_scale in sums])
        owners.append(list(parts))

    for row in layout.rows:
        for same in same_types(layout, row, arrays):
            size = arrays[same[0]].size
            parts = _parts(layout, same, 1 if stacked and size > LARGE else ADDENDS)
            if stacked and len(parts) > 1 and size < SMALL and not layout.kept(same[0]):
                for chunk in chunks(same, MOST):
                    whole = jnp.stack([arrays[i].ravel() for i in chunk])
                    add(lambda s, x=whole: lifted(norm, x, s), chunk, 1)
                continue
            for part in parts:
                leaves = [arrays[i] for i in part]
                pooled = layout.axes_of(part[0])
                add(lambda s, xs=leaves: _together(norm, xs, s), part[:1], pooled)
    return _joined(layout, pools, owners, len(scales), dtype)


def stacking(norm: Norm, layout: Layout, arrays, scales, dtype) -> Pools:
    """Like `plain`, but small alike leaves of several blocks at once, and large ones one by one."""
    return plain(norm, layout, arrays, scales, dtype, stacked=True)


def variadic(norm: Norm, layout: Layout, arrays, scales, dtype) -> Pools:
    """Stacks alike leaves for one `lax.reduce` of all scales: one kernel where `plain` has many.

    A part is always a single leaf, even if leaves share a block. A clip of the whole tree then
    takes the same sums as a `watch` by leaf before it, and XLA computes them once.
    """

    def contribute(x: jax.Array) -> list[jax.Array]:
        return [lifted(norm, x, scale) for scale in scales]

    pools, owners = [], []
    for leaves, sums in reduce_alike(contribute, norm.pool, layout, arrays, STACKED):
        pools.append([x.astype(dtype).ravel() for x in sums])
        owners.append(list(leaves))
    return _joined(layout, pools, owners, len(scales), dtype)


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
                yield leaves, _reduce(contribute(whole), how, below)


def _reduce(operands: list[jax.Array], how: str, axes: tuple[int, ...]) -> list[jax.Array]:
    if how == "max":
        return [largest(x, axes) for x in operands]

    def step(a, b):
        return tuple(map(lax.add, a, b))

    zeros = tuple(jnp.zeros((), x.dtype) for x in operands)
    return list(lax.reduce(tuple(operands), zeros, step, axes))


def _joined(layout: Layout, pools, owners: list[list[int]], scales: int, dtype) -> Pools:
    """Joins all pools in one concatenation, as XLA:TPU runs each small operation as a kernel.

    They are joined in the order of blocks as far as can be, so that little is left to gather.
    """
    if not pools:
        return jnp.zeros((scales, 0), dtype), []
    order = sorted(range(len(pools)), key=lambda i: layout.blocks.index[owners[i][0]])
    joined = jnp.concatenate([pools[i][scale] for scale in range(scales) for i in order])
    return joined.reshape(scales, -1), [leaf for i in order for leaf in owners[i]]
