"""One bound per leaf, from a tree of bounds."""

from __future__ import annotations

from typing import Any

import jax
import optax

from optaxclip import scopes, trees, validate
from optaxclip.base import Exclude
from optaxclip.thresholds.blocks import new_threshold
from optaxclip.thresholds.by_name import each_by_name
from optaxclip.thresholds.convert import as_threshold


def bound_leaves(exclude: Exclude, **argument: Any) -> optax.GradientTransformationExtraArgs:
    """Combines the bounds of leaves into one threshold.

    Args:
      exclude: leaves whose bounds do not count.
      **argument: by the name of the argument, a threshold for all leaves, or a number, schedule or
        threshold for each: a tree of them like the updates, or a mapping of paths.
    """
    ((name, bounds),) = argument.items()
    if not _is_tree(bounds):
        threshold = as_threshold(**argument)
        # A scalar array is one bound for all leaves, like a number.
        return _refuse_vector(name, bounds) if getattr(bounds, "ndim", 0) else threshold
    validate.exclude(exclude)
    excluded = trees.matcher(exclude)
    flat, _ = trees.flatten_with_paths(bounds, validate.is_transformation)
    kept = [(path, bound) for path, bound in flat if not excluded(path)]
    # The scope's own names, which distinguish equal paths in bounds and updates in the same way.
    names = scopes.leaf.cut([path for path, _ in kept], [()] * len(kept)).names
    named = dict(zip(names or (), (bound for _, bound in kept), strict=True))
    return each_by_name(**{name: named})


def _is_tree(bounds: Any) -> bool:
    """Checks whether `bounds` is a container but not a threshold (a tuple of two functions)."""
    if bounds is None or validate.is_transformation(bounds):
        return False
    # A function, although JAX treats it as a container.
    if isinstance(bounds, jax.tree_util.Partial):
        return False
    return not jax.tree_util.all_leaves([bounds])


def _refuse_vector(argument: str, bounds: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a threshold that refuses norms because its bounds are a bare vector.

    It has to wait for a tree, because only the tree names the leaves for the error.
    """

    def update_fn(norms, state, params=None, *, block_names=(), **extra_args):
        names = list(block_names or ())
        raise ValueError(
            f"{validate.called()}: {argument} is a bare array of shape {bounds.shape}, which does"
            " not say which leaf each number is for. Pass a tree of bounds with the structure of"
            f" the updates, or a mapping of paths, such as {dict.fromkeys(names[:2], 1.0)}. The"
            f" paths are, in order: {names}."
        )

    return new_threshold(lambda norms: optax.EmptyState(), update_fn)
