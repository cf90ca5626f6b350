"""Blocks of whole leaves: the tree, each leaf, or groups of leaves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from optaxclip.base import Blocks, Label, Scope
from optaxclip.validate import called, fail, is_function, makes_part, named, pattern

#: One block: all leaves share one norm. Norms, bounds and factors are scalars.
tree = Scope("scopes.tree", lambda paths, shapes: Blocks(None, (0,) * len(paths)))


def _by_label(labels: Sequence[str]) -> Blocks:
    """One block for each label, in the order of their first leaves."""
    # Not sorted: layer 10 would come before layer 2 in every record and plot.
    names = tuple(dict.fromkeys(labels))
    places = {name: i for i, name in enumerate(names)}
    return Blocks(names, tuple(places[label] for label in labels))


def _number_repeats(paths: Sequence[str]) -> list[str]:
    """Numbers paths that occur more than once, as in `{"a/b": x, "a": {"b": y}}`."""
    # Blocks are identified by name: two leaves with the same name would share a norm.
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
    """The label of each leaf. Exactly one of the regular expressions must match."""
    if callable(label):
        return [label(path) for path in paths]
    # Several matches are an error: otherwise the order of the mapping would silently decide.
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
    # `groups(scopes.units)` is callable, and would fail only when a tree is cut.
    if not (is_function(label) or hasattr(label, "items")):
        must = "a function of a leaf's path, or a mapping of regular expressions to names"
        raise fail(f"label must be {must}", label)
    if isinstance(label, Mapping):
        pattern(**{f"label {rule!r}": rule for rule in label})
    given = "" if label is module_of else getattr(label, "__name__", label)
    return Scope(
        f"scopes.groups({given})",
        lambda paths, shapes: _by_label(_label_paths(label, paths)),
        named=True,
    )


def as_scope(scope: Scope, *, named: bool = False) -> Scope:
    """The scope, if it is one; with `named`, one whose blocks have names.

    Raises:
      ValueError: naming the call and what there is.
    """
    if isinstance(scope, Scope) and (scope.named or not named):
        return scope
    choices = "scopes.leaf, scopes.groups(...) or scopes.stacked(...)"
    if not named:
        choices = f"scopes.tree, {choices.replace(' or', ',')}, scopes.units(...) or scopes.element"
    raise fail(f"scope must be {choices}", scope)
