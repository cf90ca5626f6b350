"""The numbers of a tree that a clip measures, and what they are called.

Only leaves that hold real or complex floating-point numbers are gradients.  Integers, booleans, `float0`, PRNG keys and
whatever the user excludes pass through a clip untouched and unmeasured.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.mesh import alone

Exclude = str | Callable[[str], bool] | None


class Leaves(NamedTuple):
    """The measured leaves of a tree, in order, and the way back to the tree.

    Attributes:
      paths: one string a leaf, such as `blocks/0/attn/kernel`.
      arrays: the leaves themselves.
      rebuild: takes new arrays, one a measured leaf, and returns the whole tree.
    """

    paths: tuple[str, ...]
    arrays: list[jax.Array]
    rebuild: Callable[[list[jax.Array]], Any]


def path_string(key_path) -> str:
    """A key path as `blocks/0/attn/kernel`: the same for dicts, lists, attributes and Flax's variables.

    Flax nnx hands `init` its variables, whose paths end in `value`, and `update` plain arrays, whose paths do not; the
    trailing `value` is dropped so that both name one leaf.

    >>> import jax
    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"blocks": [{"kernel": 1.0}]})
    >>> path_string(path)
    'blocks/0/kernel'
    """
    parts = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
    while len(parts) > 1 and parts[-1] in ("value", "raw_value"):
        parts.pop()
    return "/".join(parts)


def is_measured(leaf) -> bool:
    """Whether a leaf holds floating-point numbers, real or complex, of any width."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def as_exclude(exclude: Exclude, call: str) -> Exclude:
    """What to leave alone, if that is a way to say so.

    Raises:
      ValueError: naming the call.
    """
    if exclude is None or isinstance(exclude, str) or callable(exclude):
        return exclude
    choices = "a regular expression (str), a predicate of the path, or None"
    raise ValueError(f"{call}: exclude must be {choices}, got {exclude!r}.")


def matcher(exclude: Exclude) -> Callable[[str], bool]:
    """A regular expression (searched), a predicate, or None, as a predicate of paths."""
    if exclude is None:
        return lambda path: False
    if isinstance(exclude, str):
        return lambda path: re.search(exclude, path) is not None
    return exclude


def measured_leaves(tree, exclude: Exclude = None) -> Leaves:
    """Picks the leaves to measure out of a tree."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves, excluded = [leaf for _, leaf in flat], matcher(exclude)
    named = {i: path_string(path) for i, (path, leaf) in enumerate(flat) if is_measured(leaf)}
    picked = {i: path for i, path in named.items() if not excluded(path)}

    def rebuild(arrays):
        new = dict(zip(picked, arrays, strict=True))
        return treedef.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])

    found = (leaves[i] for i in picked)
    return Leaves(tuple(picked.values()), [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in found], rebuild)


def bunches(arrays: list[jax.Array], largest: int = 4096, most: int = 256) -> list[list[int]]:
    """Which arrays to lay side by side: small ones of one dtype and nearly one size, at most `most`; others alone."""
    chunks: dict[Any, list] = {}
    for i, x in enumerate(arrays):
        chunks.setdefault((x.dtype, max(x.size - 1, 63).bit_length()) if x.size < largest else i, []).append(i)
    return [chunk[i : i + most] for chunk in chunks.values() for i in range(0, len(chunk), most)]


def side_by_side(arrays: list[jax.Array]) -> jax.Array:
    """One row an array, filled up with zeros."""
    longest = max(x.size for x in arrays)
    filled = [piece for x in arrays for piece in (x.ravel(), np.zeros(longest - x.size, x.dtype))]
    return jnp.concatenate(filled).reshape(len(arrays), longest)


def one_vector(parts: list[jax.Array]) -> jax.Array:
    """Vectors, and scalars, one after the other."""
    return jnp.concatenate([jnp.atleast_1d(part) for part in parts]) if parts else jnp.zeros(0)


def pack(arrays: list[jax.Array]) -> jax.Array:
    """All numbers of a list of arrays, in one vector."""
    return one_vector([x.ravel() for x in arrays])


def unpack(vector: jax.Array, like: list) -> list[jax.Array]:
    """The reverse of `pack`, in the shapes of `like`."""
    ends = np.cumsum([0, *(np.size(x) for x in like)])
    parts = zip(ends[:-1], ends[1:], like, strict=True)
    return [vector[start:end].reshape(np.shape(x)) for start, end, x in parts]


def map_blocks(f: Callable[..., tuple], outputs: int, *trees) -> tuple:
    """Maps `f`, which works element by element, over block values (arrays, or lists of them) that go together.

    Returns one tree for each output. Where arrays may be joined, `f` is one vector operation over all of a list.
    """
    treedef = jax.tree.structure(trees[0])
    lists = list(map(treedef.flatten_up_to, trees))
    if len(lists[0]) > 1 and alone() and _equal_shapes(lists):
        done = f(*map(pack, lists))
        return tuple(treedef.unflatten(unpack(vector, lists[0])) for vector in done)
    each = [f(*block) for block in zip(*lists, strict=True)]
    return tuple(treedef.unflatten([block[i] for block in each]) for i in range(outputs))


def _equal_shapes(lists: list[list]) -> bool:
    """Whether all lists hold arrays of the shapes of the first."""
    shapes = [[np.shape(x) if jax.tree.structure(x) == _ARRAY else None for x in one] for one in lists]
    return all(one == shapes[0] for one in shapes)


_ARRAY = jax.tree.structure(0)
