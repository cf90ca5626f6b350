"""Over which devices a leaf is spread, for code that runs per device.

Under plain `jit` there is nothing to do: XLA sees whole arrays. Inside `shard_map` and `pmap` each
device sees its own part, and a norm must be pooled over the devices that hold the other parts, but
not over those that hold copies. `shard_map` records the difference in the type of every array (the
mesh axes over which it varies). With `check_vma=False` and in `pmap` types do not say, and the user
must: otherwise the norm would silently be a local one.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import validate
from optaxclip.base import AxisNames
from optaxclip.compat import manual_axes, varying_axes
from optaxclip.xla.placing import types_are_kept, vary
from optaxclip.xla.widths import from_order, in_order


class Span(NamedTuple):
    """The mesh axes over which each leaf of a tree varies.

    Attributes:
      leaves: one set of axis names per leaf, along which its other parts lie; empty if nothing is
        spread.
      axes: all axes that occur, in order: pooled values are combined over these.
      explicit: whether the caller named the axes.
      mesh: all mesh axes along which code runs per device, with their sizes. Blocks may depend on
        both, and layouts are cached by the span.
      unnamed: the axes for each leaf over which its type varies and that the caller did not name:
        devices along these hold copies of a leaf, or leaves of their own.
    """

    leaves: tuple[frozenset[str], ...] = ()
    axes: tuple[str, ...] = ()
    explicit: bool = False
    mesh: tuple[tuple[Any, int], ...] = ()
    unnamed: tuple[frozenset[str], ...] = ()

    def parts(self, leaf: int) -> int:
        """How many devices share leaf `leaf`."""
        return count_devices(self._own(leaf))

    def copies(self, leaf: int) -> int:
        """How many copies of leaf `leaf` a sum over all `axes` meets."""
        return count_devices(axis for axis in self.axes if axis not in self._own(leaf))

    def pool(self, x: jax.Array, how: str) -> jax.Array:
        """`x` pooled over all axes; the result is the same on every device."""
        return _across(x, self.axes, how)

    def pool_leaf(self, x: jax.Array, leaf: int, how: str) -> jax.Array:
        """`x`, which belongs to one leaf, pooled over the axes of that leaf."""
        return _across(x, tuple(sorted(self._own(leaf))), how)

    def check_units(self) -> None:
        """Raises if units or layers may be cut: a type does not say along which dimension."""
        if not self.explicit and any(self.parts(leaf) > 1 for leaf in range(len(self.leaves))):
            raise ValueError(
                f"{validate.called()}: a clip of units or layers inside shard_map, over the mesh"
                f" axes {self.axes}, cannot know whether these cut units or lie between them: a"
                " type says over which axes a leaf varies, not along which of its dimensions. Pass"
                " axis_names= to the clip: for each leaf (as a tree, or a function of the path)"
                " the axes that cut its units or layers, and () where every device holds whole"
                " ones. Where each device holds some of the layers, pass a scope that says over"
                " which axes: scopes.stacked(..., over=...)."
            )

    def _own(self, leaf: int) -> frozenset[str]:
        return self.leaves[leaf] if self.leaves else frozenset()


NOWHERE = Span()


def count_devices(axes: Iterable[str]) -> int:
    """How many devices lie along mesh axes."""
    return math.prod(lax.axis_size(axis) for axis in axes)


# Not an argument of every clip: these axes belong to whoever calls a clip, which may be a foreign
# one.
_APART: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "apart", default=frozenset()
)


@contextlib.contextmanager
def apart(axes: Sequence[str]) -> Generator[None, None, None]:
    """Makes each device along `axes` measure its own gradient, whatever types say. A context."""
    token = _APART.set(_APART.get() | frozenset(axes))
    try:
        yield
    finally:
        _APART.reset(token)


def _across(x: jax.Array, axes: tuple[str, ...], how: str) -> jax.Array:
    if not axes:
        return x
    x = vary(x, axes)
    return lax.psum(x, axes) if how == "sum" else from_order(lax.pmax(in_order(x), axes))


def hold_everywhere(condition: jax.Array) -> jax.Array:
    """Whether a condition holds on all devices among which it varies by type."""
    return _meet(condition, lax.pmin)


def hold_somewhere(condition: jax.Array) -> jax.Array:
    """Whether a condition holds on any of the devices among which it varies by type."""
    return _meet(condition, lax.pmax)


def _meet(condition: jax.Array, how: Callable[..., jax.Array]) -> jax.Array:
    axes = _shown(condition)
    return how(condition.astype(jnp.int32), axes) > 0 if axes else condition


def pool_shown(x: jax.Array, how: str) -> jax.Array:
    """`x` pooled over the devices among which it varies by type."""
    return _across(x, _shown(x), how)


def _shown(x: jax.Array) -> tuple[str, ...]:
    return tuple(sorted(varying_axes(x) - _APART.get()))


def check_axes(names: Iterable[str], argument: str) -> None:
    """Raises ValueError, naming the argument that has these names, if one is no axis here."""
    for axis in sorted(names):
        try:
            lax.axis_size(axis)
        except NameError:
            raise ValueError(_absent(axis, argument)) from None


def _absent(axis: str, argument: str) -> str:
    start = f"{validate.called()}: {argument} names {axis!r}, but here is no axis of this name."
    if axes := manual_axes():
        return f"{start} This code runs in shard_map or pmap, over the mesh axes {axes}."
    return (
        f"{start} Only shard_map, pmap and vmap(axis_name=...) make axes. Under plain jit leave"
        f" {argument} out."
    )


def is_names(x) -> bool:
    """Whether `x` is one axis name or a tuple of them."""
    return isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(name, str) for name in x))


def _named(axis_names: AxisNames, paths: Sequence[str]) -> list:
    """`axis_names`, one entry per leaf."""
    if is_names(axis_names):
        return [axis_names] * len(paths)
    # `()` is an entry and means "no axis", but to JAX it is a node without leaves.
    names = (
        [axis_names(path) for path in paths]
        if callable(axis_names)
        else jax.tree.leaves(axis_names, is_leaf=is_names)
    )
    strange = [name for name in names if not is_names(name)]
    if strange or len(names) != len(paths):
        must = "one axis name or tuple of names, a function of the path, or a tree with one such"
        count = f"entry for each of the {len(paths)} measured leaves"
        raise validate.fail(f"axis_names must be {must} {count}", (strange or [axis_names])[0])
    return names


def find_span(arrays: Sequence[Any], paths: Sequence[str], axis_names: AxisNames | None) -> Span:
    """Over which mesh axes each leaf varies: as `axis_names` says, else as the types say.

    Raises:
      ValueError: inside a `shard_map` or `pmap` whose types are silent, if `axis_names` is None;
        anywhere, if it names what is no axis there.
    """
    own = _APART.get()
    axes = tuple(axis for axis in manual_axes() if axis not in own)
    if axis_names is None and not axes:
        return NOWHERE
    typed = [varying_axes(x) - own for x in arrays]
    if axis_names is not None:
        names = _named(axis_names, paths)
        said = [frozenset((n,) if isinstance(n, str) else n) - own for n in names]
        check_axes(frozenset().union(*said), "axis_names=")
    elif types_are_kept():
        said = typed
    elif all(lax.axis_size(axis) == 1 for axis in axes):
        said = [frozenset()] * len(typed)  # one device holds everything: local norms are global
    else:
        raise ValueError(_silent(axes))
    # Axes that only types name are pooled over as well: arrays that the caller calls replicated
    # become so by type. Sorted, because all processes must compile the same program, and the order
    # of a set of strings differs between processes.
    return Span(
        tuple(said),
        tuple(sorted(frozenset().union(*said, *typed))),
        axis_names is not None,
        tuple((axis, lax.axis_size(axis)) for axis in axes),
        tuple(own - names for own, names in zip(typed, said, strict=True)),
    )


def _silent(axes: tuple[Any, ...]) -> str:
    """Says why the span is unknown and what to write, the case of averaged gradients first."""
    call = validate.called()
    if any(not isinstance(axis, str) or axis.startswith("_") for axis in axes):  # JAX's own name
        return (
            f"{call}: a clip inside pmap without axis_name cannot communicate: only the norm of"
            " each device's own gradients can be taken. Pass axis_names=() to the clip if that is"
            " meant, for example because the gradients are the same on every device; else name the"
            ' axis, jax.pmap(step, axis_name="batch").'
        )
    return (
        f"{call}: a clip inside shard_map(check_vma=False) or pmap, over the mesh axes {axes},"
        " cannot know over which of them the gradients are spread. Pass axis_names= to the clip:"
        " axis_names=() if they are already the same on every device, which they are after pmean"
        " or psum (to tell, print them on each device with jax.debug.print);"
        f" axis_names={axes!r} if each device holds a different part of one gradient, as with"
        " sharded parameters. Or keep check_vma=True, where nothing need be said."
    )
