"""Which leaves are alike, and so may be reduced or multiplied together.

Leaves are alike if their shapes are equal and their paths differ only in digits (`h/3/qkv`,
`h/7/qkv`). Such leaves are sharded in the same way on any mesh, so adding their squares, or
stacking them along a new axis, moves nothing between devices: no all-gather on any mesh tried.
Concatenating leaves that are *not* alike would save a few more kernels on one device, but on a mesh
XLA gathers each of them. Whether there is a mesh cannot be asked: under `jit(in_shardings=...)` the
types of arrays do not say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import validate
from optaxclip.base import Blocks
from optaxclip.xla.mesh import NOWHERE, Span, count_devices


class Layout(NamedTuple):
    """How the leaves of a tree lie in blocks and on devices, and which are alike. Hashable.

    Attributes:
      blocks: how leaves are cut into blocks.
      shapes: of the leaves.
      rows: sets of leaves that are alike, by their numbers; each leaf is in one.
      arrays: sets of rows whose unit norms are stored in one array, by their numbers.
      span: over which devices each leaf is spread.
    """

    blocks: Blocks
    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    arrays: tuple[tuple[int, ...], ...]
    span: Span

    def axes_of(self, leaf: int) -> tuple[int, ...]:
        """The axes of a leaf that are reduced: those of a unit or layer, or all."""
        axes = self.blocks.axes
        return tuple(range(len(self.shapes[leaf]))) if axes is None else axes[leaf]

    def kept(self, leaf: int) -> tuple[int, ...]:
        """The shape of the norms of a leaf: the axes that are not reduced."""
        pooled = self.axes_of(leaf)
        return tuple(n for axis, n in enumerate(self.shapes[leaf]) if axis not in pooled)

    def over(self, leaf: int) -> tuple[str, ...]:
        """The mesh axes over which the layers of a leaf are cut."""
        return self.blocks.over[leaf] if self.blocks.over else ()

    def blocks_of(self, leaf: int) -> range:
        """The block of a leaf, or the blocks of the layers that it stacks, on all devices."""
        first = self.blocks.index[leaf]
        return range(first, first + math.prod(self.kept(leaf)) * count_devices(self.over(leaf)))

    def check_layers(self) -> None:
        """Raises if devices may hold layers of their own, or copies: types do not say which."""
        if self.blocks.units or self.blocks.over:
            return
        for leaf, axes in enumerate(self.span.unnamed):
            if self.kept(leaf) and count_devices(axes) > 1:
                name = (self.blocks.names or ())[self.blocks.index[leaf]]
                raise ValueError(
                    f"{validate.called()}: by type the leaf of the layer {name!r} differs over the"
                    f" mesh axes {tuple(sorted(axes))}, which axis_names= does not name. Pass a"
                    " scope that says what devices hold: scopes.stacked(..., over=...) with the"
                    " axes over which layers are cut, or over=() if each device has copies of all."
                )

    def among_all(self, x: jax.Array, leaves: Sequence[int]) -> jax.Array:
        """The last axis of `x`, the own layers of leaves, each in its place among those of all.

        Elsewhere are zeros, so that to pool over devices is to join.
        """
        if not any(map(self.over, leaves)):
            return x

        def place(own, leaf):
            over, count = self.over(leaf), own.shape[-1]
            whole = jnp.zeros((*own.shape[:-1], count * count_devices(over)), own.dtype)
            start = lax.axis_index(over) * count if over else 0
            return lax.dynamic_update_slice_in_dim(whole, own, start, own.ndim - 1)

        ends = np.cumsum([math.prod(self.kept(leaf)) for leaf in leaves])[:-1]
        parts = zip(jnp.split(x, ends, axis=-1), leaves, strict=True)
        return jnp.concatenate([place(own, leaf) for own, leaf in parts], axis=-1)

    def own_layers(self, values: jax.Array, leaf: int) -> jax.Array:
        """What a vector of all blocks has for the layers of a leaf that are on this device."""
        places, over = self.blocks_of(leaf), self.over(leaf)
        if not over:
            return values[places.start : places.stop]
        count = math.prod(self.kept(leaf))
        start = places.start + lax.axis_index(over) * count
        return lax.dynamic_slice_in_dim(values, start, count)


def group(keys: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Sets of positions with equal keys, ordered by first occurrence."""
    # Not sorted by key: keys hold shapes and `None`, which cannot be compared.
    rows: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, []).append(i)
    return tuple(map(tuple, rows.values()))


def lay_out(blocks: Blocks, paths: Sequence[str], shapes, span: Span = NOWHERE) -> Layout:
    """The layout of a tree. Rows ignore dtypes, which may differ between `init` and an update."""
    # Tuples throughout: a layout is a static argument of jitted functions and has to be hashable.
    axes = blocks.axes or [None] * len(paths)
    # Norms that differ among devices would, in one array with others, make these differ by type.
    apart = span.unnamed or [frozenset()] * len(paths)
    each = zip(paths, shapes, axes, apart, strict=True)
    rows = group([(re.sub(r"\d+", "#", path), *rest) for path, *rest in each])
    # A unit that is a whole leaf has a scalar norm, whatever the shape of the leaf. One array for
    # all biases and scales takes 28 kernels less on a TPU than one array per row.
    whole = [axes[row[0]] == tuple(range(len(shapes[row[0]]))) for row in rows]
    arrays = group([apart[row[0]] if whole[r] else r for r, row in enumerate(rows)])
    span = _span_layers(blocks, _span_units(blocks, span))
    return Layout(blocks, tuple(shapes), rows, arrays, span)


def _span_layers(blocks: Blocks, span: Span) -> Span:
    """The span of leaves of which it is known over which mesh axes their layers are cut."""
    if not blocks.over or not span.mesh:
        return span
    own = span.leaves or (frozenset(),) * len(blocks.over)
    leaves = tuple(one.union(more) for one, more in zip(own, blocks.over, strict=True))
    axes = tuple(sorted(frozenset(span.axes).union(*leaves)))
    return span._replace(leaves=leaves, axes=axes, explicit=True)


def _span_units(blocks: Blocks, span: Span) -> Span:
    """The span of units: a unit of a single number is never spread, even if its leaf is."""
    if not blocks.units or not span.leaves:
        return span
    each = zip(span.leaves, blocks.axes or (), strict=True)
    return span._replace(leaves=tuple(own if axes else frozenset() for own, axes in each))


def same_types(layout: Layout, row: Sequence[int], arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Splits a row by the types of its leaves (dtype, and varying axes in `shard_map`) and span."""
    # Not part of the layout: the same leaves may be float32 at `init` and bfloat16 at an update.
    keys = [
        (jax.typeof(arrays[i]), layout.span.leaves[i] if layout.span.leaves else None) for i in row
    ]
    return [[row[i] for i in part] for part in group(keys)]


def chunks(row: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Splits a row into pieces of at most `size`."""
    return [row[i : i + size] for i in range(0, len(row), size)]


def per_leaf(rows: Sequence[Sequence[int]], values: Callable[[int, int], Any]) -> list[Any]:
    """`values(row, position in the row)` for each leaf, in leaf order."""
    found = {leaf: values(r, i) for r, row in enumerate(rows) for i, leaf in enumerate(row)}
    return [found[leaf] for leaf in range(len(found))]
