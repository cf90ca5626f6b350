"""One bound for each block, by name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import validate
from optaxclip.base import Blocks, Scope, Threshold
from optaxclip.thresholds.blocks import new_threshold


def is_tree(bounds: Any) -> bool:
    """Whether `bounds` is a tree of bounds: a container, and no threshold (a tuple of two functions)."""
    if bounds is None or validate.is_transformation(bounds):
        return False
    if isinstance(bounds, jax.tree_util.Partial):  # a function, though a container to JAX
        return False
    return not jax.tree_util.all_leaves([bounds])


def bound_each(bounds: Mapping[str, Any], scope: Scope) -> tuple[Threshold, Scope]:
    """The bounds of all blocks as one threshold, and the scope, its blocks in the order of these bounds.

    Raises:
      ValueError: for a bound that is no number and no schedule; where a tree is cut, if its blocks
        have other names.
    """
    for name, bound in bounds.items():
        if not callable(bound):
            validate.nonnegative(**{f"max_norm[{name!r}]": bound})

    def stack(step):
        # Here and not where the clip is built: an array that is made inside `jit` would outlive it.
        each = [bound(step) if callable(bound) else bound for bound in bounds.values()]
        return jnp.asarray(each, jnp.result_type(float))

    def update_fn(norms, state, params=None, **extra_args):
        return stack(0).astype(norms.dtype), state

    changing = any(map(callable, bounds.values()))
    fixed = new_threshold(lambda norms: optax.EmptyState(), update_fn)
    return stack if changing else fixed, in_order(scope, tuple(bounds))


def in_order(scope: Scope, names: tuple[str, ...]) -> Scope:
    """The scope, whose blocks must have these names, and are put in their order."""
    call = validate.called()

    def cut(paths, shapes) -> Blocks:
        blocks = scope.cut(paths, shapes)
        missing = [name for name in blocks.names if name not in names]
        unknown = [name for name in names if name not in blocks.names]
        if missing or unknown:
            raise ValueError(
                f"{call}: max_norm must have one entry for each of the blocks {list(blocks.names)}:"
                f" {missing} are missing, {unknown} are not among them."
            )
        places = [names.index(name) for name in blocks.names]
        return Blocks(names, tuple(places[block] for block in blocks.index))

    return scope._replace(cut=cut)


def refuse_vector(scope: Scope, bounds: Any) -> Scope:
    """The scope, which refuses to cut a tree for bounds that are a bare vector.

    It has to wait for a tree, since only that can tell which number would be whose.
    """
    if not getattr(bounds, "ndim", 0):
        return scope
    call = validate.called()

    def cut(paths, shapes) -> Blocks:
        names = scope.cut(paths, shapes).names
        raise ValueError(
            f"{call}: max_norm is a bare array of shape {bounds.shape}, which does not say which number is"
            f" whose. Pass a tree of bounds with the structure of the updates, or a mapping of paths, such"
            f" as {dict.fromkeys(names[:2], 1.0)}. The paths are, in order: {list(names)}."
        )

    return scope._replace(cut=cut)
