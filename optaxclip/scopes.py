"""Which numbers share one norm: the whole tree, a leaf, a group of leaves, or a unit of a leaf."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from optaxclip.base import Blocks, Label, Scope
from optaxclip.validate import called, fail, makes_part, named

#: One block: all leaves share one norm. Norms, bounds and factors are scalars.
tree = Scope("scopes.tree", lambda paths, shapes: Blocks(None, (0,) * len(paths)))


def _by_label(labels: Sequence[str]) -> Blocks:
    """One block for each label, in the order of their first leaves."""
    # Not sorted: layer 10 would come before layer 2, in every record and plot.
    names = tuple(dict.fromkeys(labels))
    places = {name: i for i, name in enumerate(names)}
    return Blocks(names, tuple(places[label] for label in labels))


def _number_repeats(paths: Sequence[str]) -> list[str]:
    """The paths, numbered from the second of one name on (`{"a/b": x, "a": {"b": y}}`)."""
    # Blocks are found by their names: two leaves of one name would share a norm.
    seen: Counter = Counter()
    out = []
    for path in paths:
        seen[path] += 1
        out.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return out


#: One block per leaf. Norms, bounds and factors are vectors, one entry per leaf, in tree order.
leaf = Scope("scopes.leaf", lambda paths, shapes: _by_label(_number_repeats(paths)), named=True)


def module_of(path: str) -> str:
    """The module that a leaf belongs to: its path without the last part.

    >>> from optaxclip import scopes
    >>> scopes.module_of("blocks/0/attn/kernel")
    'blocks/0/attn'
    """
    return path.rpartition("/")[0]


def _label_paths(label: Label, paths: Sequence[str]) -> list[str]:
    """The label of each leaf. Of regular expressions exactly one must match."""
    if callable(label):
        return [label(path) for path in paths]
    # The first match does not win: then the order of a mapping would decide, in silence.
    matches = [
        {name for pattern, name in label.items() if re.search(pattern, path)} for path in paths
    ]
    wrong = [
        f"{p} ({', '.join(sorted(m)) or 'none'})"
        for p, m in zip(paths, matches, strict=True)
        if len(m) != 1
    ]
    if wrong:
        raise ValueError(
            f"{called()}: every leaf must match exactly one group; of the patterns {list(label)}"
            f" these leaves match none or several: {'; '.join(wrong)}. Add or narrow patterns, or"
            " exclude= the leaves."
        )
    return [name for (name,) in matches]


@makes_part
@named
def groups(label: Label = module_of) -> Scope:
    """One block per group of leaves. Norms, bounds and factors are vectors, one entry per group.

    Groups are in the order of their first leaves.

    Args:
      label: the group of a leaf, as a function of its path (`blocks/0/attn/kernel`; by default the
        module, `blocks/0/attn`) or a mapping of regular expressions, searched in the path, to
        names.

    Raises:
      ValueError: if `label` is neither; where a tree is cut, if a leaf matches no pattern of a
        mapping, or patterns of several groups.

    >>> from optaxclip import scopes
    >>> by_kind = scopes.groups({"attn": "attention", "mlp|embed": "rest"})
    >>> by_kind.cut(["0/attn/kernel", "0/mlp/kernel"], [(2,), (2,)]).names
    ('attention', 'rest')
    """
    # `groups(scopes.units)` is callable, and would fail only where a tree is cut.
    if getattr(label, "makes_part", False) or not (callable(label) or hasattr(label, "items")):
        must = "a function of a leaf's path, or a mapping of regular expressions to names"
        raise fail(f"label must be {must}", label)
    given = "" if label is module_of else getattr(label, "__name__", label)
    return Scope(
        f"scopes.groups({given})",
        lambda paths, shapes: _by_label(_label_paths(label, paths)),
        named=True,
    )


# Optax's rule by rank: the input axes of a dense layer (IO), or of a convolution (HWIO, DHWIO). Of
# rank 3 it is that of Optax's code, axis 0; its documentation says otherwise.
_INPUTS = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}


def _follow_convention(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # As in Optax, (1, n) and (n, 1) count as vectors, which are one unit.
    if sum(n != 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    if len(shape) not in _INPUTS:
        raise ValueError(
            f"{called()}: there is no convention for the axes of a leaf of rank {len(shape)}:"
            f" {path!r} has shape {shape}. Pass the axes that a unit spans, for example as a"
            " function of the path."
        )
    return _INPUTS[len(shape)]


def unit_axes(
    path: str, shape: tuple[int, ...], axes: Any = None, batch_axes: int = 0
) -> tuple[int, ...]:
    """The axes of a leaf that one unit spans, counted from 0. See `units`."""
    rank = len(shape) - batch_axes
    if rank < 0:
        raise ValueError(
            f"{called()}: batch_axes={batch_axes}, but the leaf {path!r} has only {len(shape)}"
            f" axes, {shape}."
        )
    if axes is Ellipsis or (rank <= 1 and axes != ()):
        chosen = tuple(range(rank))
    elif axes is None:
        chosen = _follow_convention(path, shape[batch_axes:])
    else:
        chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -rank <= axis < rank for axis in chosen):
        raise ValueError(
            f"{called()}: the axes {axes!r} do not fit the leaf {path!r} of shape {shape},"
            f" batch_axes={batch_axes}."
        )
    return tuple(sorted({axis % rank + batch_axes for axis in chosen}))


@makes_part
@named
def units(axes: Any = None, *, batch_axes: int | Callable[[str], int] | None = None) -> Scope:
    """One block per unit, a slice of a leaf along `axes`. Norms, bounds, factors: small arrays.

    Norms are right from 1e-36 to 1e36. On a CPU a unit below 1e-19 counts as zeros if another of
    its leaf is not.

    Args:
      axes: the axes that a unit spans. None: by rank as in Optax, the input axes of a dense layer
        (IO) or convolution (HWIO); an axis or a tuple of axes; `...`: all of them; `()`: none, each
        element is a unit; or a function of the path that returns one of these. Vectors and scalars
        are one unit, but for `()`.
      batch_axes: how many leading axes number layers (as `nn.scan` and `nnx.vmap` stack them), or a
        function of the path that returns it; None for 0. `axes` do not count them, and no unit
        spans them: `units(..., batch_axes=1)` gives one norm per layer.

    Raises:
      ValueError: where a tree is cut, naming the leaf, if the axes do not fit or the rank has no
        convention.
    """

    def at(rule: Any, path: str) -> Any:
        return rule(path) if callable(rule) else rule

    def cut(paths, shapes):
        pairs = zip(paths, shapes, strict=True)
        spans = tuple(unit_axes(p, s, at(axes, p), at(batch_axes, p) or 0) for p, s in pairs)
        # No names: a model has thousands of units, and the state would carry a key for each.
        return Blocks(None, (), spans)

    given = "" if axes is None else "..." if axes is Ellipsis else repr(axes)
    more = "" if batch_axes is None else f"batch_axes={batch_axes!r}"
    return Scope(f"scopes.units({', '.join(filter(None, (given, more)))})", cut)


def as_scope(scope: Scope, *, named: bool = False) -> Scope:
    """The scope, if it is one; with `named`, one whose blocks have names.

    Raises:
      ValueError: naming the call and what there is.
    """
    if isinstance(scope, Scope) and (scope.named or not named):
        return scope
    choices = "scopes.leaf or scopes.groups(...)"
    if not named:
        choices = f"scopes.tree, {choices.replace(' or', ',')} or scopes.units(...)"
    raise fail(f"scope must be {choices}", scope)


__all__ = ["groups", "leaf", "module_of", "tree", "units"]
