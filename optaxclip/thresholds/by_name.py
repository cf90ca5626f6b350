"""Bounds and thresholds of single blocks, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import validate
from optaxclip.base import Norms, annotate
from optaxclip.thresholds.blocks import Fixed, new_threshold, update_all
from optaxclip.thresholds.convert import as_threshold
from optaxclip.thresholds.fixed import ScheduleState, advance, start_schedule


@validate.named
def by_name(bounds: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """A different threshold for each block, such as `by_name({"encoder": zscore(), "head": 1.0})`.

    Every block needs an entry; there is no default. The names are those in `optaxclip.metrics`,
    `clip/grad_norm/<name>`, so the scope must be one whose blocks have names. `clip_by_leaf_norm`
    and `clip_by_group_norm` take the mapping itself.

    Args:
      bounds: a number, a schedule or a threshold for the name of each block. For a leaf or group
        that stacks layers: one for all layers, or a list or array with one per layer
        (`{"blocks": [1.0, 0.5]}`). An entry for a single layer (`blocks[3]`) takes precedence. Each
        threshold keeps statistics for all blocks, even those that it does not bound: the state has
        (thresholds) x (blocks) of them.

    Raises:
      ValueError: for an invalid bound; at the update, if these are not the names of the blocks, or
        the blocks have no names.

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import scopes, thresholds
    >>> threshold = thresholds.by_name({"a": thresholds.previous(1.5), "b": 0.1})
    >>> tx = optaxclip.clip_by(threshold, scope=scopes.leaf)
    >>> grads = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> tx.update({"a": jnp.array([9.0]), "b": jnp.array([9.0])}, state)[0]
    {'a': Array([1.5], dtype=float32), 'b': Array([0.1], dtype=float32)}
    """
    if not isinstance(bounds, Mapping):
        raise validate.fail("bounds must be a mapping, from the name of each block to its", bounds)
    return each_by_name(bounds=bounds)


def each_by_name(**argument: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Like `by_name`, for an argument of any name."""
    ((argument_name, given),) = argument.items()
    bounds = {path: x for name, bound in given.items() for path, x in _by_layer(name, bound)}
    for name, bound in bounds.items():
        what = f"{argument_name}[{name!r}]"
        if validate.is_transformation(bound) or callable(bound):
            bounds[name] = bound if validate.is_function(bound) else as_threshold(**{what: bound})
        else:
            validate.nonnegative(**{what: bound})
    fixed = _fixed(argument_name, bounds)
    learners = {name: x for name, x in bounds.items() if validate.is_transformation(x)}
    return _add_learners(argument_name, bounds, fixed, learners) if learners else fixed


def _by_layer(name: str, bound: Any) -> Iterator[tuple[str, Any]]:
    """An entry, or one entry per layer if it is a list or an array."""
    several = isinstance(bound, list | tuple) and not validate.is_transformation(bound)
    if not several and not getattr(bound, "ndim", 0):
        yield name, bound
        return
    for layer, of_layer in enumerate(bound):
        yield from _by_layer(f"{name}/{layer}", of_layer)


def _fixed(argument: str, bounds: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """The threshold for numbers and schedules; it does not bound the other blocks.

    It makes one vector, not a threshold per entry, as a tree may have hundreds of leaves.
    """

    def stack(step: Any, norms: Norms, blocks: Sequence[str] | None):
        entries = _entries(argument, bounds, blocks)
        # Not made when the clip is built: an array made inside `jit` would outlive the trace.
        now = {name: bound(step) if callable(bound) else bound for name, bound in bounds.items()}
        own = [math.inf if validate.is_transformation(now[name]) else now[name] for name in entries]
        return jnp.asarray(own, jnp.result_type(float)).astype(norms.dtype)

    def fixed_fn(norms, state, params=None, *, block_names=None, **extra_args):
        return stack(None, norms, block_names), state

    def scheduled_fn(norms, state, params=None, *, block_names=None, **extra_args):
        bounds = stack(state.clip_step, norms, block_names)
        return bounds, ScheduleState(advance(state.clip_step))

    init, update = (lambda norms: optax.EmptyState()), fixed_fn
    if any(map(validate.is_function, bounds.values())):
        init, update = start_schedule, scheduled_fn
    # Read by `check`, which compares bounds without running the clip.
    return new_threshold(init, annotate(update, bound=tuple(bounds.values())), kind=Fixed)


def _add_learners(
    argument: str,
    bounds: Mapping[str, Any],
    fixed: optax.GradientTransformationExtraArgs,
    learners: Mapping[str, optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """Fixed bounds, and learned ones for the blocks with these names."""
    inside = (fixed, *learners.values())

    # Each threshold sees all norms, though it bounds only its own blocks: its state then has the
    # shape of the norms, and the engine can hold the state of a block that is not finite.
    def init_fn(norms):
        return tuple(threshold.init(norms) for threshold in inside)

    def update_fn(norms, state, params=None, *, block_names=None, **extra_args):
        extra_args |= {"block_names": block_names}
        (out, *learned), state = update_all(inside, norms, state, params, **extra_args)
        entries = _entries(argument, bounds, block_names)
        for name, own in zip(learners, learned, strict=True):
            out = jnp.where(np.array([entry == name for entry in entries], bool), own, out)
        return out, state

    return new_threshold(init_fn, update_fn, *inside)


def _entries(argument: str, bounds: Mapping[str, Any], blocks: Sequence[str] | None) -> list[str]:
    """For each block the name of its entry: its own, or that of the leaf that it is a layer of."""
    if blocks is None:
        raise ValueError(
            f"{validate.called()}: {argument} is a mapping by block name, but the blocks of this"
            " scope have no names: use scopes.leaf, scopes.groups(...) or scopes.stacked(...)."
        )
    found = [next((x for x in _spellings(block) if x in bounds), None) for block in blocks]
    missing = [block for block, name in zip(blocks, found, strict=True) if name is None]
    # An entry for a block that does not exist is an error, too: it is a misspelt path.
    unknown = [name for name in bounds if name not in found]
    if missing or unknown:
        wrong = [f"{missing} are missing"] * bool(missing)
        wrong += [f"{unknown} are none of them"] * bool(unknown)
        raise ValueError(
            f"{validate.called()}: {argument} must have one entry for each of the blocks"
            f" {list(blocks)}: {' and '.join(wrong)}."
        )
    return [name for name in found if name is not None]


def _spellings(block: str) -> tuple[str, ...]:
    """The names by which a block may be called, first the closest: of `a[3]` also `a/3` and `a`."""
    layer = re.fullmatch(r"(.*)\[([\d,]+)\]", block)
    if layer is None:
        return (block,)
    leaf, number = layer.groups()
    return block, f"{leaf}/{number.replace(',', '/')}", leaf
