"""One bound for each block, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import scopes, trees, validate
from optaxclip.base import Blocks, Exclude, Scope, annotate
from optaxclip.thresholds.blocks import Fixed, new_threshold
from optaxclip.thresholds.fixed import as_threshold, scheduled


def bound_leaves(
    exclude: Exclude, **argument: Any
) -> tuple[optax.GradientTransformationExtraArgs, Scope]:
    """The bounds of leaves as a threshold, and the scope that goes with it.

    Args:
      exclude: leaves whose bounds do not count.
      **argument: by the name of the argument, a threshold of all leaves, or one number or schedule
        for each: a tree of them like the updates, or a mapping of paths.
    """
    ((name, bounds),) = argument.items()
    if not _is_tree(bounds):
        return as_threshold(**argument), _refuse_vector(name, bounds)
    validate.exclude(exclude)
    excluded = trees.matcher(exclude)
    flat, _ = trees.flatten_with_paths(bounds)
    kept = [(path, bound) for path, bound in flat if not excluded(path)]
    # The scope's own names: a tree of bounds and one of updates then tell equal paths apart alike.
    names = scopes.leaf.cut([path for path, _ in kept], [()] * len(kept)).names
    named = dict(zip(names or (), (bound for _, bound in kept), strict=True))
    return bound_each(scopes.leaf, **{name: named})


def _is_tree(bounds: Any) -> bool:
    """Whether `bounds` is a container, and no threshold (a tuple of two functions)."""
    if bounds is None or validate.is_transformation(bounds):
        return False
    # A function, though a container to JAX.
    if isinstance(bounds, jax.tree_util.Partial):
        return False
    return not jax.tree_util.all_leaves([bounds])


def bound_each(
    scope: Scope, **argument: Mapping[str, Any]
) -> tuple[optax.GradientTransformationExtraArgs, Scope]:
    """The bounds of blocks, by name, as one threshold, and the scope with its blocks in that order.

    Raises:
      ValueError: for a bound that is no number and no schedule; where a tree is cut, if its blocks
        have other names.
    """
    ((argument_name, bounds),) = argument.items()
    for name, bound in bounds.items():
        if not callable(bound):
            validate.nonnegative(**{f"{argument_name}[{name!r}]": bound})

    def stack(step):
        # Here and not where the clip is built: an array that is made inside `jit` would outlive it.
        each = [bound(step) if callable(bound) else bound for bound in bounds.values()]
        return jnp.asarray(each, jnp.result_type(float))

    def update_fn(norms, state, params=None, **extra_args):
        return stack(0).astype(norms.dtype), state

    if any(map(callable, bounds.values())):
        threshold = scheduled(stack)
    else:
        # For `check`, which compares bounds without running the clip.
        annotate(update_fn, bound=tuple(bounds.values()))
        threshold = new_threshold(lambda norms: optax.EmptyState(), update_fn, kind=Fixed)
    return threshold, _in_order(scope, argument_name, tuple(bounds))


def _in_order(scope: Scope, argument: str, names: tuple[str, ...]) -> Scope:
    """The scope, whose blocks must have these names, and are put in their order."""

    def cut(paths, shapes) -> Blocks:
        blocks = scope.cut(paths, shapes)
        found = blocks.names or ()
        # Both ways: a bound for a leaf that is not there is a misspelt path, whose leaf has none.
        missing = [name for name in found if name not in names]
        unknown = [name for name in names if name not in found]
        if missing or unknown:
            raise ValueError(
                f"{validate.called()}: {argument} must have one entry for each of the blocks"
                f" {list(found)}: {missing} are missing, {unknown} are not among them."
            )
        places = [names.index(name) for name in found]
        return Blocks(names, tuple(places[block] for block in blocks.index))

    return scope._replace(cut=cut)


def _refuse_vector(argument: str, bounds: Any) -> Scope:
    """The scope `leaf`, which refuses to cut a tree for bounds that are a bare vector.

    It has to wait for a tree, since only that can tell which number would be whose.
    """
    # A scalar array is one bound for all leaves, like a number.
    if not getattr(bounds, "ndim", 0):
        return scopes.leaf

    def cut(paths, shapes) -> Blocks:
        names = list(scopes.leaf.cut(paths, shapes).names or ())
        raise ValueError(
            f"{validate.called()}: {argument} is a bare array of shape {bounds.shape}, which does"
            " not say which number is whose. Pass a tree of bounds with the structure of the"
            f" updates, or a mapping of paths, such as {dict.fromkeys(names[:2], 1.0)}. The paths"
            f" are, in order: {names}."
        )

    return scopes.leaf._replace(cut=cut)
