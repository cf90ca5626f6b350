"""Which numbers share one norm: the whole tree, a leaf, a group of leaves, or a unit of a leaf.

A scope cuts a tree into blocks.  For `tree`, `leaf` and `groups` all blocks are built from one vector of contributions,
one entry a leaf: `tree` is its sum, `leaf` the vector itself, `groups` a segment sum of it.  `units` keeps one small
array a leaf, of the leaf's rank, so that it broadcasts against the leaf and keeps the leaf's sharding.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.given import said
from optaxclip.leaves import map_blocks
from optaxclip.mesh import Span
from optaxclip.norms import SUM, Pool

_HOP = 16


class Cut(NamedTuple):
    """How the leaves of one tree are cut into blocks.

    Attributes:
      names: one name a block, where blocks have names.
      axes: for each leaf the axes that a block spans; None for all of them.
      local: whether blocks lie inside a leaf, so that devices may hold different ones.
      count: how many elements each block has, given the number of devices that share each leaf.
      gather: pools contributions, a vector with one entry a leaf (for local blocks a list of arrays, one a leaf), into
        one value a block.
      spread: the reverse: the quotient of two values a block, in a shape that broadcasts against each leaf.
    """

    names: tuple[str, ...]
    axes: Sequence[tuple[int, ...] | None]
    local: bool
    count: Callable[[Sequence[int]], Any]
    gather: Callable[[Any, Pool, Span], Any]
    spread: Callable[[Any, Any], list]


class Scope(NamedTuple):
    """A rule that cuts trees into blocks.

    Attributes:
      cut: maps the paths and the shapes of the measured leaves to a `Cut`.
      named: whether blocks have names.
    """

    cut: Callable[[Sequence[str], Sequence[tuple[int, ...]]], Cut]
    named: bool = False


def _blocks(shapes, names: tuple[str, ...] = (), labels: Sequence[str] | None = None) -> Cut:
    """Blocks of whole leaves: leaf i is part of the block `labels[i]`; without labels of the only one, a scalar."""
    ids = np.array([names.index(label) for label in labels] if labels is not None else [0] * len(shapes), int)
    order = np.argsort(ids, kind="stable")
    alone = len(names) == len(ids)

    def gather(parts, pool, span):
        vector = parts[order]
        copies = np.array([span.copies(i) for i in order])
        if pool is SUM and np.any(copies != 1):
            vector = vector / copies.astype(vector.dtype)
        if labels is None:
            vector = pool.reduce(vector)
        elif not alone:
            vector = pool.segment(vector, ids[order], num_segments=len(names), indices_are_sorted=True)
        return span.pool(vector, pool.across)

    def spread(numerators, denominators):
        if labels is None:
            return [numerators / denominators] * len(shapes)
        # XLA's CPU compiler makes one kernel of equal loops, but an index into a long vector makes each loop unequal.
        # Two short hops with a division between them, which it does not merge, leave few distinct ones: a tree of 1,000
        # leaves compiles in a quarter of the time.
        hops = [slice(i, i + _HOP) for i in range(0, len(names), _HOP)]
        each = [q for hop in hops for q in _entries(numerators[hop] / denominators[hop])]
        return [each[i] for i in ids]

    def count(shares):
        sizes = np.array([math.prod(s) * n for s, n in zip(shapes, shares, strict=True)], np.float64)
        return np.sum(sizes) if labels is None else np.bincount(ids, sizes, len(names)).astype(float)

    return Cut(names, [None] * len(shapes), False, count, gather, spread)


def _entries(vector: jax.Array) -> list[jax.Array]:
    return [vector[i] for i in range(vector.shape[0])]


def _distinct(paths: Sequence[str]) -> list[str]:
    """The paths, with a number after the second and later of the same name (`{"a/b": x, "a": {"b": y}}`)."""
    seen = Counter()
    seen_before = [(path, seen.update([path]) or seen[path]) for path in paths]
    return [path if n == 1 else f"{path}#{n}" for path, n in seen_before]


def _named_blocks(labels, shapes) -> Cut:
    return _blocks(shapes, tuple(sorted(set(labels))), labels)


#: One block: all leaves share one norm. Norms, bounds and factors are scalars.
tree = Scope(lambda paths, shapes: _blocks(shapes))

#: One block a leaf. Norms, bounds and factors are vectors, one entry a leaf, in the order of the sorted paths.
leaf = Scope(lambda paths, shapes: _named_blocks(_distinct(paths), shapes), named=True)


def module_of(path: str) -> str:
    """The module that a leaf belongs to: its path without the last part.

    >>> module_of("blocks/0/attn/kernel")
    'blocks/0/attn'
    """
    return path.rpartition("/")[0]


def _labeller(label: Callable[[str], str] | Mapping[str, str]):
    """A label function as it is; a mapping of regular expressions to names as a function that insists on one match."""
    if callable(label):
        return lambda paths: [label(path) for path in paths]

    def labels(paths):
        matches = [{name for pattern, name in label.items() if re.search(pattern, path)} for path in paths]
        wrong = [f"{p} ({', '.join(sorted(m)) or 'none'})" for p, m in zip(paths, matches, strict=True) if len(m) != 1]
        if wrong:
            raise ValueError(
                f"groups: every leaf must match exactly one group; of the patterns {list(label)} these leaves match"
                f" none or several: {'; '.join(wrong)}. Add or narrow patterns, or exclude= the leaves."
            )
        return [name for (name,) in matches]

    return labels


def groups(label: Callable[[str], str] | Mapping[str, str] = module_of) -> Scope:
    """One block a group of leaves. Norms, bounds and factors are vectors, one entry a group, names sorted.

    Args:
      label: the group of a leaf, as a function of its path (`blocks/0/attn/kernel`; by default the module,
        `blocks/0/attn`) or a mapping of regular expressions, searched in the path, to names.

    Raises:
      ValueError: where a tree is cut, if a leaf matches no pattern of a mapping, or patterns of several groups.

    >>> groups({"attn": "attention", "mlp|embed": "rest"}).cut(["0/attn/kernel", "0/mlp/kernel"], [(2,), (2,)]).names
    ('attention', 'rest')
    """
    labels_of = _labeller(label)

    return Scope(lambda paths, shapes: _named_blocks(labels_of(paths), shapes), named=True)


def unit_axes(path: str, shape: tuple[int, ...], axes=None, batch_axes: int = 0) -> tuple[int, ...]:
    """The axes of a leaf that one unit spans, counted from 0. See `units`."""
    rank = len(shape) - batch_axes
    if rank < 0:
        raise ValueError(f"units: batch_axes={batch_axes}, but the leaf {path!r} has only {len(shape)} axes, {shape}.")
    whole = tuple(range(rank))
    if axes is Ellipsis or rank <= 1:
        chosen = whole
    elif axes is None:
        chosen = _conventional(path, shape[batch_axes:])
    else:
        chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -rank <= axis < rank for axis in chosen):
        raise ValueError(
            f"units: axes={axes!r} do not fit the leaf {path!r} of shape {shape}, batch_axes={batch_axes}."
        )
    return tuple(sorted({axis % rank + batch_axes for axis in chosen}))


def _conventional(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Optax's rule by rank: the input axes of a dense layer (IO), or of a convolution (HWIO, DHWIO)."""
    if sum(n != 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    spans = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}
    if len(shape) not in spans:
        raise ValueError(
            f"units: there is no convention for the axes of a leaf of rank {len(shape)}: {path!r} has shape {shape}."
            " Pass axes=, for example a function of the path."
        )
    return spans[len(shape)]


def _quotients(numerators: list, denominators: list) -> list:
    return map_blocks(lambda n, d: (n / d,), 1, numerators, denominators)[0]


def units(axes=None, *, batch_axes: int | Callable[[str], int] | None = None) -> Scope:
    """One block a unit, a slice of a leaf along `axes`. Norms, bounds and factors are one small array a leaf.

    Args:
      axes: the axes that a unit spans. None: by rank as in Optax, the input axes of a dense layer (IO) or convolution
        (HWIO); an axis or a tuple of axes; `...`: all of them; or a function of the path that returns one of these.
        Vectors and scalars are one unit whatever `axes` is.
      batch_axes: how many leading axes number layers (as `nn.scan` and `nnx.vmap` stack them), or a function of the
        path that returns it; None for 0. `axes` do not count them, and no unit spans them:
        `units(..., batch_axes=1)` gives one norm a layer.

    Raises:
      ValueError: where a tree is cut, naming the leaf, if the axes do not fit or the rank has no convention.
    """

    def cut(paths, shapes):
        def of(rule, path):
            return rule(path) if callable(rule) else rule

        spans = [unit_axes(p, s, of(axes, p), of(batch_axes, p) or 0) for p, s in zip(paths, shapes, strict=True)]

        def count(shares):
            sizes = [math.prod(shape[a] for a in span) for shape, span in zip(shapes, spans, strict=True)]
            kept = [
                tuple(1 if a in span else n for a, n in enumerate(s)) for s, span in zip(shapes, spans, strict=True)
            ]
            return [np.full(k, float(size * n)) for k, size, n in zip(kept, sizes, shares, strict=True)]

        return Cut((), spans, True, count, lambda parts, pool, span: span.pool_each(parts, pool.across), _quotients)

    return Scope(cut)


def as_scope(scope: Scope, call: str, *, named: bool = False) -> Scope:
    """The scope, if it is one; with `named`, one whose blocks have names.

    Raises:
      ValueError: naming the call and what there is.
    """
    if isinstance(scope, Scope) and (scope.named or not named):
        return scope
    choices = "leaf or groups(), whose blocks have names" if named else "tree, leaf, groups() or units()"
    raise ValueError(f"{call}: scope must be optaxclip.{choices}, got {said(scope, groups, units)}.")
