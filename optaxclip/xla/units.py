"""Sums of units, how they are joined into arrays of norms, and where those lie on devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optaxclip.base import Norm
from optaxclip.compat import varying_axes
from optaxclip.xla.layout import Layout, chunks, same_types
from optaxclip.xla.placing import spec_of, vary
from optaxclip.xla.sums import REDUCE, lifted

# Each element of a stack takes as many selects, and reads as many arrays.
_SELECTED, _FEW = 8, 1 << 16

# Pools of units, split along the leaves of an array of norms: each piece has one array per scale,
# for several leaves, or for one leaf and then without the axis of leaves.
Pieces = list[list[jax.Array]]


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
    axes, reduce = layout.axes_of(row[0]), REDUCE[norm.pool]
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
    if pieces[0].ndim == ndim or pieces[0].size > _FEW:
        return join(pieces, ndim)

    def select(part):
        # Not of NumPy's: XLA:TPU reads a constant mask from memory.
        place = lax.broadcasted_iota(np.int32, (len(part), *part[0].shape), 0)
        met = jnp.broadcast_to(part[0], place.shape)
        for i, x in enumerate(part[1:], start=1):
            met = jnp.where(place == i, x, met)
        return met

    return join([select(part) for part in chunks(pieces, _SELECTED)], ndim)


def place_units(norms: list[jax.Array], layout: Layout, arrays: Sequence[Any]) -> list[jax.Array]:
    """Arrays in the shape of the norms of units, moved to where measured norms lie.

    The arrays are leaves, or their shapes. The norm of a unit varies over the axes of its leaf that
    do not cut it, and Explicit axes cut it as they cut the leaf.
    """
    whole = layout.span.leaves or [frozenset()] * len(arrays)
    varying = [varying_axes(x) - cut for x, cut in zip(arrays, whole, strict=True)]
    specs = _specs(layout, arrays)
    placed = []
    for norm, rows, spec in zip(norms, layout.arrays, specs, strict=True):
        axes = frozenset().union(*(varying[leaf] for r in rows for leaf in layout.rows[r]))
        placed.append(vary(jax.sharding.reshard(norm, spec) if any(spec) else norm, axes))
    return placed


def _specs(layout: Layout, arrays: Sequence[Any]) -> list[PartitionSpec]:
    """How Explicit axes cut each array of norms."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays if any(spec_of(x))]
    here = jax.sharding.get_abstract_mesh()
    # Outside the `jax.set_mesh` of these axes XLA does not know their devices.
    if not meshes or any(mesh != here for mesh in meshes):
        return [PartitionSpec()] * len(layout.arrays)

    def spec(rows):
        leaves = [leaf for r in rows for leaf in layout.rows[r]]
        kinds = {_kept_spec(spec_of(arrays[leaf]), layout.axes_of(leaf)) for leaf in leaves}
        return PartitionSpec(None, *(kinds.pop() if len(kinds) == 1 else ()))

    return [spec(rows) for rows in layout.arrays]


def _kept_spec(spec: PartitionSpec, pooled: Sequence[int]) -> tuple[Any, ...]:
    return tuple(names for axis, names in enumerate(spec) if axis not in pooled)
