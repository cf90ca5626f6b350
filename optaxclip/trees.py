"""Which leaves of a tree are gradients, how they are named, and how the tree is rebuilt.

Only leaves of real or complex floating-point numbers are gradients. Integers, booleans, `float0`,
PRNG keys, functions, strings and whatever the user excludes pass through a clip unmeasured and
unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.base import Exclude


class Leaves(NamedTuple):
    """The measured leaves of a tree, in tree order, and how to rebuild the tree.

    Attributes:
      paths: one string per leaf, such as `blocks/0/attn/kernel`.
      shapes: of the leaves.
      arrays: the leaves.
      rebuild: takes new arrays, one per measured leaf, and returns the whole tree.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    arrays: list[Any]
    rebuild: Callable[[list[Any]], Any]


def is_measured(leaf: Any) -> bool:
    """Whether a leaf holds floating-point numbers, real or complex, of any width."""
    # By dtype, not by type: `init` is also given shapes, and NumPy scalars are leaves, too.
    dtype = getattr(leaf, "dtype", type(leaf) if isinstance(leaf, float | complex) else None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_variable(x: Any) -> bool:
    """Whether `x` is a variable of Flax's nnx, which wraps an array in an attribute."""
    # By its attributes: Flax is not a dependency, and has renamed the class.
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "raw_value")


def flatten_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their paths, and its structure.

    Flax's nnx passes variables to `init` and plain arrays to `update`. So that a leaf has the same
    name in both, the attribute of a variable that holds its array (`value`) is left out of the
    path. A leaf that is itself called `value`, as in attention, keeps its name.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    variables = {path for path, node in nodes if is_variable(node)}
    if variables:
        flat = [(_skip_attribute(path, variables), leaf) for path, leaf in flat]
    return [(path_string(path), leaf) for path, leaf in flat], treedef


def _skip_attribute(path, variables):
    """A path without the attribute of an nnx variable that holds its array."""
    ends = [n for n in range(len(path)) if path[:n] in variables]
    return path[: ends[0]] + path[ends[0] + 1 :] if ends else path


def path_string(key_path) -> str:
    """A key path as `blocks/0/attn/kernel`: the same for dicts, lists and attributes.

    >>> import jax
    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"blocks": [{"kernel": 1.0}]})
    >>> path_string(path)
    'blocks/0/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def matcher(exclude: Exclude) -> Callable[[str], bool]:
    """A regular expression (searched), a predicate, or None, as a predicate of paths."""
    if exclude is None:
        return lambda path: False
    if isinstance(exclude, str):
        return lambda path: re.search(exclude, path) is not None
    return exclude


def select(tree: Any, exclude: Exclude = None) -> Leaves:
    """The leaves to measure: arrays, or shapes where `init` is given shapes."""
    flat, treedef = flatten_with_paths(tree)
    excluded = matcher(exclude)
    # By position, not by path: two leaves may share a path, as in `{"a/b": x, "a": {"b": y}}`.
    picked = {
        i: path for i, (path, leaf) in enumerate(flat) if is_measured(leaf) and not excluded(path)
    }

    def rebuild(arrays):
        new = dict(zip(picked, arrays, strict=True))
        return treedef.unflatten([new.get(i, leaf) for i, (_, leaf) in enumerate(flat)])

    # Only Python numbers are converted; the shapes that `eval_shape` passes cannot be.
    leaves = [x if hasattr(x, "dtype") else jnp.asarray(x) for x in (flat[i][1] for i in picked)]
    return Leaves(tuple(picked.values()), tuple(x.shape for x in leaves), leaves, rebuild)


def match_params(leaves: Leaves, params: Any, exclude: Exclude, call: str) -> list[jax.Array]:
    """The parameters of the measured updates, matched by position: paths need not be unique.

    Raises:
      ValueError: if there are none, or they are not those of the updates.
    """
    if params is None:
        raise ValueError(
            f"{call}: this clip needs the parameters: write tx.update(grads, state, params), not"
            " tx.update(grads, state)."
        )
    own = select(params, exclude)
    # Compare shapes, not structures: with Flax's nnx one tree may hold variables and the other
    # arrays.
    if own.shapes == leaves.shapes:
        return own.arrays
    # Some parameters get no gradient (None in an Equinox model). The others are found by path.
    known = dict(zip(own.paths, own.arrays, strict=True))
    for path, shape in zip(leaves.paths, leaves.shapes, strict=True):
        if path not in known or known[path].shape != shape:
            seen = f"has shape {known[path].shape}" if path in known else "is missing"
            raise ValueError(
                f"{call}: the update {path!r} has shape {shape}, but among the parameters it"
                f" {seen}."
            )
    return [known[path] for path in leaves.paths]


def drop_gradientless(params: Any, updates: Any) -> Any:
    """The parameters that have an update, in a tree of the same structure as the updates.

    An Equinox model may be passed unfiltered: it has functions and strings where updates have None.
    """
    if params is None:
        return updates
    if jax.tree.structure(params) == jax.tree.structure(updates):
        return params
    try:
        return jax.tree.map(
            lambda u, p: None if u is None else p, updates, params, is_leaf=lambda u: u is None
        )
    except ValueError:  # containers of other types, of which an optimizer may not look at one
        return params


def pack_names(names: Sequence[str]) -> dict[str, Any]:
    """Stores names as the keys of nested dicts without leaves, one branch per block, in order.

    This way names are part of every state and checkpoint without an array, and without a custom
    node type that a serializer would have to know. Paths are nested because a key with "/" does not
    survive `flatten_dict(sep="/")`. Each begins with a number because two blocks may share a path.
    """
    # Zero-padded, because JAX sorts the keys of a dict: "10" would come before "2".
    digits = len(str(len(names)))

    def branch(parts):
        return {parts[0]: branch(parts[1:]) if len(parts) > 1 else None}

    return {f"{i:0{digits}}": branch(name.split("/")) for i, name in enumerate(names)}


def unpack_names(blocks: Any) -> tuple[str, ...]:
    """The inverse of `pack_names`."""

    def path(branch):
        ((key, below),) = branch.items()
        return key if below is None else f"{key}/{path(below)}"

    return tuple(path(blocks[key]) for key in sorted(blocks))
