"""Which parameters share one norm of an example, and how large it may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.base import Blocks, Scope
from optaxclip.scopes.leaves import tree
from optaxclip.thresholds.by_name import each_by_name
from optaxclip.trees import select


def cut_parameters(scope: Scope, params: Any) -> Blocks:
    """Cuts the parameters into blocks; one block if there are no parameters.

    Raises:
      ValueError: naming the scope, if a block is a part of a parameter.
    """
    leaves = select(params)
    if not leaves.arrays:
        return tree.cut((), ())
    blocks = scope.cut(leaves.paths, [jnp.shape(x) for x in leaves.arrays])
    # Ghost clipping finds the norm of the gradient of a whole parameter, not of its units.
    if blocks.axes is not None:
        raise validate.fail("scope must be scopes.tree, scopes.leaf or scopes.groups(...)", scope)
    return blocks


def count_blocks(blocks: Blocks) -> int:
    """Returns K, the number of norms that an example has."""
    return 1 if blocks.names is None else len(blocks.names)


def check_bounds(max_norm: Any) -> None:
    """Raises if `max_norm` cannot bound an example, whatever the parameters are."""
    if not isinstance(max_norm, Mapping):
        validate.bound(max_norm=max_norm)
        return
    for name, bound in max_norm.items():
        validate.nonnegative(**{f"max_norm[{name!r}]": bound})


def as_bounds(max_norm: ArrayLike | Mapping[str, ArrayLike], blocks: Blocks) -> ArrayLike:
    """Returns the bound as one number, or one number per block.

    Raises:
      ValueError: naming the blocks, if `max_norm` is a mapping from other names, or an array of
        another shape.
    """
    count = count_blocks(blocks)
    if isinstance(max_norm, Mapping):
        threshold = each_by_name(max_norm=max_norm)
        norms, names = jnp.zeros(count), blocks.names
        out, _ = threshold.update(norms, optax.EmptyState(), block_names=names)
        return jnp.asarray(out)
    fits = [()] if blocks.names is None else [(), (count,)]
    # Any other shape would silently broadcast against the examples, as one bound per example.
    if jnp.shape(max_norm) not in fits:
        must = "one number" if blocks.names is None else f"one number, or {count}, one per block"
        raise validate.fail(f"max_norm must be {must}", f"an array of shape {jnp.shape(max_norm)}")
    return max_norm
