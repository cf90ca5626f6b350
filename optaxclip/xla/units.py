"""Where the norms of units lie: on the devices of their units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optaxclip.compat import varying_axes
from optaxclip.xla.layout import Layout
from optaxclip.xla.placing import spec_of, vary


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
