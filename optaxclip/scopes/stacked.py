"""Blocks of single layers, where one leaf stacks those of all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optaxclip.base import Blocks, Scope, Stacked
from optaxclip.compat import manual_axes
from optaxclip.scopes.leaves import as_scope, leaf
from optaxclip.trees import matcher
from optaxclip.validate import called, fail, is_function, makes_part, named
from optaxclip.xla import check_axes, count_devices, is_names


@makes_part
@named
def stacked(
    where: Stacked,
    scope: Scope = leaf,
    *,
    over: str | tuple[str, ...] | Callable[[str], str | tuple[str, ...]] | None = None,
) -> Scope:
    """One block per layer of each leaf that stacks layers; other leaves are cut as by `scope`.

    `nn.scan`, `nnx.scan`, `jax.vmap` and `lax.scan` over layers give parameters an axis that
    numbers the layers. The leaf `blocks/attn/kernel` of shape (12, 64, 64) is cut into the blocks
    `blocks/attn/kernel[0]` to `[11]`, each with its own norm, bound and statistics. A clip then
    does the same as for a model that keeps its layers in a list. Norms, bounds and factors are
    vectors, one entry per block. Nothing is unstacked. Under `jit` leaves may be sharded over any
    axis, including that of the layers: only norms are communicated.

    Args:
      where: which leaves stack layers. A regular expression, searched in the path, or a predicate
        of the path: their first axis numbers the layers. Or a mapping of these to that axis, or to
        several: `{"^blocks": 1}`, or `{"^blocks": (0, 1)}` for blocks such as `blocks/kernel[2,3]`.
      scope: which leaves of one layer share a norm: `scopes.leaf`, or `scopes.groups(label)` for
        blocks such as `blocks/attn[3]`.
      over: inside `shard_map`, the mesh axes that cut the (first) axis of layers, so that each
        device holds some of the layers: a name, a tuple of names, or a function of the path; ()
        where every device holds all layers, or a part of each. A device measures its own layers,
        and all devices have the norms of all: the state is the same on each, and the same as under
        `jit`.

    Raises:
      ValueError: for a bad `where` or `over`, or a scope without names; where a tree is cut, if no
        leaf matches, a leaf has no such axis, or one group stacks leaves of several lengths; inside
        `shard_map`, if a leaf is cut and neither `over` nor `axis_names` says how.

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import scopes
    >>> grads = {"blocks": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "head": jnp.array([1.0])}
    >>> tx = optaxclip.clip_by(1.0, scope=scopes.stacked("^blocks"))
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> updates["blocks"]
    Array([[0.6, 0.8],
           [0.3, 0.4]], dtype=float32)
    >>> float(optaxclip.metrics(state)["clip/grad_norm/blocks[0]"])
    5.0
    """
    axes_of, scope, over_of = _stack_axes(where), as_scope(scope, named=True), _mesh_axes(over)

    def cut(paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Blocks:
        blocks = scope.cut(paths, shapes)
        if blocks.axes is not None:
            raise fail("scope must be one of whole leaves", scope)
        leaves = zip(paths, shapes, strict=True)
        stacks = [_axes(path, shape, axes_of(path)) for path, shape in leaves]
        # With a misspelt rule all layers of a leaf would silently share one norm.
        if paths and not any(stacks):
            raise ValueError(
                f"{called()}: none of the leaves {list(paths)} stacks layers by the rule {where!r}."
            )
        labels = [(blocks.names or ())[i] for i in blocks.index]
        each = list(zip(shapes, stacks, strict=True))
        spans = [
            tuple(axis for axis in range(len(shape)) if axis not in stack) for shape, stack in each
        ]
        cuts = [over_of(path) if stack else () for path, stack in zip(paths, stacks, strict=True)]
        lengths = [_count_layers(*pair, own) for pair, own in zip(each, cuts, strict=True)]
        known = tuple(cuts) if over is not None else ()
        return _by_layer(labels, lengths)._replace(axes=tuple(spans), over=known)

    given = repr(where) if scope is leaf else f"{where!r}, {scope!r}"
    more = "" if over is None else f", over={over!r}"
    return Scope(f"scopes.stacked({given}{more})", cut, named=True)


def _mesh_axes(over: Any) -> Callable[[str], tuple[str, ...]]:
    """The mesh axes that cut the layers of a leaf where this code runs, by its path."""
    if not (over is None or is_names(over) or is_function(over)):
        raise fail(
            "over must be mesh axes: a name, a tuple of names or a function of the path", over
        )

    def axes_of(path: str) -> tuple[str, ...]:
        names = over(path) if callable(over) else over or ()
        names = (names,) if isinstance(names, str) else names
        axes = manual_axes()
        # Axes of the mesh that are not of a `shard_map` around this cut no array here. A misspelt
        # one would silently do the same.
        if axes:
            known = jax.sharding.get_abstract_mesh().axis_names
            check_axes(set(names) - set(known), "over=")
        # Outside of `shard_map`, as where `init` is called, arrays are whole.
        return tuple(name for name in names if name in axes)

    return axes_of


def _count_layers(shape: tuple[int, ...], stack: tuple[int, ...], over: tuple[str, ...]):
    """How many layers a leaf has along each of their axes, on all devices together."""
    first, *more = [shape[axis] for axis in stack] or [1]
    return (first * count_devices(over), *more) if stack else ()


def _stack_axes(where: Stacked) -> Callable[[str], tuple[int, ...]]:
    """The axes of a leaf that number layers, as a function of its path; () if none does."""
    rules = list(where.items()) if isinstance(where, Mapping) else [(where, 0)]
    rules = [(rule, (axes,) if isinstance(axes, int) else axes) for rule, axes in rules]
    if not all(_is_rule(*rule) for rule in rules):
        must = "a regular expression or predicate of the path, or a mapping of these to axes"
        raise fail(f"where must be {must}", where)
    each = [(matcher(rule), axes) for rule, axes in rules]

    def axes_of(path: str) -> tuple[int, ...]:
        found = {axes for matches, axes in each if matches(path)}
        # Several matches are an error: otherwise the order of the mapping would silently decide.
        if len(found) > 1:
            raise ValueError(f"{called()}: {path!r} matches several rules of {where!r}.")
        return next(iter(found), ())

    return axes_of


def _is_rule(rule: Any, axes: Any) -> bool:
    # A function that makes a part, such as `scopes.groups` without parentheses, is not a predicate.
    says = isinstance(rule, str) or is_function(rule)
    return says and isinstance(axes, tuple) and all(isinstance(axis, int) for axis in axes)


def _axes(path: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a leaf that number layers, counted from 0."""
    rank = len(shape)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(
            f"{called()}: the leaf {path!r} of shape {shape} has no axes {axes}, which would number"
            " layers."
        )
    return tuple(sorted({axis % rank for axis in axes}))


def _by_layer(labels: Sequence[str], lengths: Sequence[tuple[int, ...]]) -> Blocks:
    """One block for each label and layer, in the order of their first leaves."""
    keys, first, names = list(zip(labels, lengths, strict=True)), {}, []
    for label, length in dict.fromkeys(keys):
        other = {n for name, n in first if name == label and n} - {length}
        # Layer 3 of an encoder and layer 3 of a longer decoder should not share a norm.
        if length and other:
            raise ValueError(
                f"{called()}: the leaves of {label!r} stack {min(other)} and {length} layers: give"
                " them labels of their own."
            )
        first[label, length] = len(names)
        names += [label + _suffix(layer) for layer in np.ndindex(*length)]
    return Blocks(tuple(names), tuple(first[key] for key in keys))


def _suffix(layer: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, layer))}]" if layer else ""
