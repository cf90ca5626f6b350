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

from optaxclip.base import Blocks
from optaxclip.compat import varying_axes
from optaxclip.xla.mesh import NOWHERE, Span, vary


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

    def blocks_of(self, leaf: int) -> range:
        """The block of a leaf, or the blocks of the layers that it stacks."""
        first = self.blocks.index[leaf]
        return range(first, first + math.prod(self.kept(leaf)))


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
    rows = group(
        [
            (re.sub(r"\d+", "#", path), shape, ax)
            for path, shape, ax in zip(paths, shapes, axes, strict=True)
        ]
    )
    # A unit that is a whole leaf has a scalar norm, whatever the shape of the leaf. One array for
    # all biases and scales takes 28 kernels less on a TPU than one array per row.
    whole = [axes[row[0]] == tuple(range(len(shapes[row[0]]))) for row in rows]
    arrays = group(["whole" if all_of_it else r for r, all_of_it in enumerate(whole)])
    return Layout(blocks, tuple(shapes), rows, arrays, _span_units(blocks, span))


def _span_units(blocks: Blocks, span: Span) -> Span:
    """The span of units: a unit of a single number is never spread, even if its leaf is."""
    if not blocks.units or not span.leaves:
        return span
    each = zip(span.leaves, blocks.axes or (), strict=True)
    return span._replace(leaves=tuple(own if axes else frozenset() for own, axes in each))


def vary_units(zeros: list[Any], layout: Layout, arrays: Sequence[Any]) -> list[Any]:
    """Zeros in the shape of the norms of units, cast to the types that measured norms have.

    The norm of a unit varies over the axes of its leaf that do not cut it.
    """
    whole = layout.span.leaves or [frozenset()] * len(arrays)
    own = [varying_axes(x) - cut for x, cut in zip(arrays, whole, strict=True)]
    sets = [[own[leaf] for r in array for leaf in layout.rows[r]] for array in layout.arrays]
    each = zip(zeros, sets, strict=True)
    return [vary(x, sorted(frozenset().union(*axes))) for x, axes in each]


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
