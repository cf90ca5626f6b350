"""Converts leaves to stacks of matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from optaxclip import trees, validate, xla
from optaxclip.trees import Leaves

# Tells from a path which axes of a leaf are cut over which mesh axes.
Cuts = Callable[[str], PartitionSpec]


class Form(NamedTuple):
    """How one leaf becomes a stack of matrices, (layers, m, n): n is its last axis, m the others.

    A vector is one column, whose singular value is its norm.

    Attributes:
      shape: the shape of the part of the leaf that this device has.
      stack: the axes of layers.
      spec: how the leaf is cut inside `shard_map`.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    spec: PartitionSpec

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The sides, m and n, of a leaf of this shape."""
        rest = [n for axis, n in enumerate(shape) if axis not in self.stack]
        return (math.prod(rest[:-1]), rest[-1]) if len(rest) > 1 else (math.prod(rest), 1)

    def read(self, x: jax.Array) -> jax.Array:
        """The matrices of a leaf, whole on all devices."""
        for axis, names in self._cuts():
            x = lax.all_gather(x, names, axis=axis, tiled=True)
        m, n = self.sides(x.shape)
        layers = math.prod(self.shape[axis] for axis in self.stack)
        return jnp.moveaxis(xla.widen(x), self.stack, range(len(self.stack))).reshape(layers, m, n)

    def write(self, matrices: jax.Array, like: jax.Array) -> jax.Array:
        """Turns matrices into the leaf, or this device's part of it, in the dtype of `like`."""
        whole = list(self.shape)
        for axis, names in self._cuts():
            whole[axis] *= lax.axis_size(names)
        rest = [n for axis, n in enumerate(whole) if axis not in self.stack]
        x = matrices.reshape([whole[axis] for axis in self.stack] + rest)
        x = jnp.moveaxis(x, range(len(self.stack)), self.stack)
        for axis, names in self._cuts():
            size = self.shape[axis]
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
        return xla.as_dtype_of(like, x)

    def _cuts(self) -> list[tuple[int, tuple[str, ...]]]:
        """The axes that are cut, each with the mesh axes it is cut over."""
        return [(i, names_of(PartitionSpec(part))) for i, part in enumerate(self.spec) if part]


def find_forms(leaves: Leaves, layout: xla.Layout, cuts: Cuts) -> list[Form]:
    """Finds the form of each leaf.

    Raises:
      ValueError: if layers are spread over devices: each device has a bound for every layer.
    """

    def find(i: int, path: str, shape: tuple[int, ...]) -> Form:
        inside, spec = layout.axes_of(i), cuts(path)
        stack = tuple(axis for axis in range(len(shape)) if axis not in inside)
        if any(part for axis, part in enumerate(spec) if axis in stack):
            raise ValueError(
                f"{validate.called()}: specs must not cut the leaf {path!r} between its layers, got"
                f" {spec}: on every device the state has one entry per layer. Cut other axes."
            )
        return Form(shape, stack, spec)

    places = range(len(leaves.paths))
    return [find(*leaf) for leaf in zip(places, leaves.paths, leaves.shapes, strict=True)]


def as_cuts(specs: Any) -> Cuts:
    """Turns one spec for all leaves, a function, or a tree of specs into a function of the path."""
    if specs is None or isinstance(specs, PartitionSpec):
        return lambda path: PartitionSpec() if specs is None else specs
    if callable(specs):
        return specs
    flat, _ = trees.flatten_with_paths(specs, lambda x: isinstance(x, PartitionSpec))
    known = dict(flat)
    if not all(isinstance(spec, PartitionSpec) for spec in known.values()):
        must = "specs must be a PartitionSpec, a function of the path, or a tree of PartitionSpecs"
        raise validate.fail(must, specs)

    def cut(path: str) -> PartitionSpec:
        if path not in known:
            must = f"specs must have an entry for {path!r}"
            raise ValueError(f"{validate.called()}: {must}, got {list(known)}.")
        return known[path]

    return cut


def names_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    return tuple(name for part in parts for name in part)
