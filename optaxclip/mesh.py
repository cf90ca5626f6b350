"""Over which devices a leaf is spread, where the code itself runs on one device of many.

Under plain `jit` there is nothing to do: XLA sees whole arrays.  Inside `shard_map` (and `pmap`) each device sees its
own part, and a norm must be pooled over the devices that hold the other parts - but not over those that hold copies.
`shard_map` keeps the difference in the type of every array (the mesh axes over which it varies), so it need not be
said; with `check_vma=False` and in `pmap` the types are silent, and it must be: never a silent local norm.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AxisNames = str | tuple[str, ...] | Callable[[str], Any] | Any


def alone() -> bool:
    """Whether this process sees one device, and compiles for no mesh of more: then no array is spread over several.

    Only then may arrays be joined: XLA would gather those that are spread.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 and (mesh.empty or mesh.size == 1)


class Span(NamedTuple):
    """The mesh axes over which each leaf of a tree varies.

    Attributes:
      leaves: one set of axis names a leaf: where its other parts lie.
      axes: all axes that occur, in order: over these the pooled values are agreed.
      explicit: whether the caller named the axes.
    """

    leaves: tuple[frozenset[str], ...]
    axes: tuple[str, ...]
    explicit: bool

    def size(self, leaf: int) -> int:
        """How many devices share leaf `leaf`."""
        return math.prod(lax.psum(1, axis) for axis in self.leaves[leaf])

    def copies(self, leaf: int) -> int:
        """How many copies of leaf `leaf` a sum over all `axes` meets."""
        return math.prod(lax.psum(1, axis) for axis in self.axes if axis not in self.leaves[leaf])

    def pool(self, x: jax.Array, across) -> jax.Array:
        """`x` pooled over all axes, the same on every device from there on."""
        return across(_vary(x, self.axes), self.axes) if self.axes else x

    def pool_each(self, parts: list[jax.Array], across) -> list[jax.Array]:
        """Each leaf's part pooled over the axes of that leaf only."""
        if self.axes and not self.explicit:
            raise ValueError(
                f"A clip of units inside shard_map, over the mesh axes {self.axes}, cannot know whether these cut units"
                " or lie between them: a type says over which axes a leaf varies, not along which of its dimensions."
                " Pass axis_names= to the clip: for each leaf (as a tree, or a function of the path) the axes that cut"
                " its units, and () where every device holds whole units."
            )
        axes = [tuple(sorted(names)) for names in self.leaves]
        return [across(_vary(x, own), own) if own else x for x, own in zip(parts, axes, strict=True)]

    def any(self, flag: jax.Array) -> jax.Array:
        """Whether `flag` is true on any device."""
        return lax.pmax(_vary(flag.astype(jnp.int32), self.axes), self.axes) > 0 if self.axes else flag


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x`, cast to the type that a collective over `axes` takes."""
    missing = tuple(axis for axis in axes if axis in _manual_axes() and axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing and _types_are_kept() else x


def varying_axes(x) -> frozenset[str]:
    """The mesh axes over which an array varies, read from its type."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(jax.typeof(x), "vma", ()) if kind is None else kind.varying)


def _manual_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _types_are_kept() -> bool:
    """Whether `shard_map` keeps track of what varies: its own axis index certainly does."""
    return all(axis in varying_axes(lax.axis_index(axis)) for axis in _manual_axes())


def is_names(x) -> bool:
    """Whether `x` is one axis name or a tuple of them."""
    return isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(name, str) for name in x))


def _named(axis_names: AxisNames, paths: Sequence[str]) -> list:
    """`axis_names`, one entry a leaf."""
    if is_names(axis_names):
        return [axis_names] * len(paths)
    if callable(axis_names):
        return [axis_names(path) for path in paths]
    names = jax.tree.leaves(axis_names, is_leaf=is_names)
    if len(names) != len(paths) or not all(map(is_names, names)):
        raise ValueError(
            f"axis_names= must be one axis name or tuple of names, a function of the path, or a tree with one such"
            f" entry for each of the {len(paths)} measured leaves; got {axis_names!r}."
        )
    return names


def find_span(arrays: Sequence[jax.Array], paths: Sequence[str], axis_names: AxisNames | None) -> Span:
    """Over which mesh axes each leaf varies: as `axis_names` says, else as the types say.

    Raises:
      ValueError: inside a `shard_map` or `pmap` whose types are silent, if `axis_names` is None.
    """
    typed = [varying_axes(x) for x in arrays]
    if axis_names is not None:
        said = [frozenset((n,) if isinstance(n, str) else n) for n in _named(axis_names, paths)]
    elif _types_are_kept():
        said = typed
    else:
        raise ValueError(
            f"A clip inside shard_map(check_vma=False) or pmap, over the mesh axes {_manual_axes()}, cannot know over"
            " which of them the gradients are spread. Pass axis_names= to the clip: the axes that share one norm, such"
            f" as axis_names={_manual_axes()!r}; axis_names=() if the gradients are already the same on every device"
            " (after pmean, for example); or keep check_vma=True, where nothing need be said."
        )
    # Axes that only the types name are agreed over too: a value that the caller calls replicated becomes so by type.
    return Span(tuple(said), tuple(sorted(frozenset().union(*said, *typed))), axis_names is not None)
