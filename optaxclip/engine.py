"""The engine of every clip: measure, ask the threshold, act, record.

A clip is this engine with a scope, a threshold and a `Rule`, which says what is measured and how
the leaves are changed. Read an update from top to bottom in `build`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import validate, xla
from optaxclip.base import (
    AxisNames,
    ClipState,
    Exclude,
    Nonfinite,
    Norm,
    Norms,
    Scope,
    SizedView,
    View,
    annotate,
)
from optaxclip.compat import varying_axes
from optaxclip.record import Step, fresh_metrics, record
from optaxclip.scopes import leaf, tree
from optaxclip.states import ParamsMemory, StateGuard, explain_leaves, init_inside
from optaxclip.thresholds.blocks import hold, reads_params
from optaxclip.trees import Leaves, drop_gradientless, match_params, pack_names, select


class Description(NamedTuple):
    """What a transformation is made of, for code that inspects a chain: `tx.update.description`.

    Attributes:
      scope, norm, threshold, action, view, exclude: as given to `clip_by`; None where there is no
        such part.
      nonfinite: as given to `clip_by`.
      kind: "blocks": each block is multiplied by the factor from `action`; "elements": each
        element is limited by itself; "other": anything else, such as a clip with memory.
      name: the public call.
      inner: what a wrapper holds.
    """

    scope: Scope | None = None
    norm: Norm | None = None
    threshold: Any = None
    action: Any = None
    view: View | SizedView | None = None
    exclude: Exclude = None
    nonfinite: Nonfinite = "propagate"
    kind: Literal["blocks", "elements", "other"] = "blocks"
    name: str = ""
    inner: optax.GradientTransformation | None = None


class Rule(NamedTuple):
    """What distinguishes one clip from another, besides scope and threshold.

    Attributes:
      measure: `(leaves, layout) -> norms`; None if nothing is measured, and the threshold does not
        read norms.
      act: `(leaves, layout, norms, bounds) -> (new leaves, Step)`.
      bounded: whether the `Step` has bounds; limits of single elements are not recorded.
    """

    measure: Callable[[Leaves, xla.Layout], Norms] | None
    act: Callable[[Leaves, xla.Layout, Norms, Norms], tuple[list[jax.Array], Step]]
    bounded: bool = True


def build(
    about: Description, rule: Rule, axis_names: AxisNames | None
) -> optax.GradientTransformationExtraArgs:
    """Makes a clip from a rule and the scope and threshold in `about`."""
    validate.exclude(about.exclude)
    # Read now, while the public call is running: at the update its name is no longer known.
    about = about._replace(name=validate.called())
    memory = ParamsMemory(about.name, needed=about.scope is not tree)
    threshold = about.threshold

    def init_fn(params):
        with validate.speak_for(about.name):
            return _start(about, rule, axis_names, memory.recall(params))

    guard = StateGuard(about.name, ClipState, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        with validate.speak_for(about.name):
            leaves = select(updates, about.exclude)
            state = _accept(guard, state, updates)
            step = functools.partial(clip, leaves)
            rest = params, extra_args
            arrays, state = xla.call_in_auto_axes(step, leaves.arrays, state, rest)
            return leaves.rebuild(arrays), state

    def clip(leaves: Leaves, arrays: list[jax.Array], state: ClipState, rest: tuple[Any, dict]):
        leaves, (params, extra_args) = leaves._replace(arrays=arrays), rest
        # Without a measurement devices have nothing to agree on, and no axis names are needed.
        span = xla.NOWHERE
        if rule.measure is not None:
            span = xla.find_span(leaves.arrays, leaves.paths, axis_names)
        layout = lay_out(about.scope, leaves.paths, leaves.shapes, span)
        # The dtype chosen at `init`, where the parameters may have been wider than the gradients.
        known = jax.tree.leaves(state.metrics.clip_bound)
        dtype = known[0].dtype if known else xla.accumulator(leaves.arrays)
        norms, param_norms = _measure(about, rule, leaves, layout, params, dtype)
        # For thresholds by name. It is all that a threshold is told about the scope.
        extra_args = {**extra_args, "block_names": layout.blocks.names}
        bounds, new = threshold.update(norms, state.threshold, param_norms, **extra_args)
        arrays, done = rule.act(leaves, layout, norms, bounds)
        # Done here and not in each threshold, so that a NaN does not move any of them, including
        # those of users and of Optax.
        new = hold(threshold.init, norms, new, state.threshold)
        return arrays, ClipState(new, record(state.metrics, done))

    annotate(update_fn, description=about)
    return optax.GradientTransformationExtraArgs(guard.init, update_fn)


def guarded(
    kind: type, init_fn: Callable[..., Any], update_fn: Callable[..., Any], about: Description
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that rejects foreign states and describes itself.

    Args:
      kind: the type of its state.
      init_fn, update_fn: as in Optax.
      about: its description, to which the name of the public call is added.
    """
    call = validate.called()
    guard = StateGuard(call, kind, init_fn)

    def check_and_update(updates, state, params=None, **extra_args):
        guard.check(state, drop_gradientless(params, updates))
        return update_fn(updates, state, params, **extra_args)

    annotate(check_and_update, description=about._replace(name=call))
    return optax.GradientTransformationExtraArgs(guard.init, check_and_update)


def chain(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` for a public call that returns the whole chain: errors name that call."""
    call, tx = validate.called(), optax.chain(*parts)

    def update_fn(updates, state, params, **extra_args):
        like = None if params is None else drop_gradientless(params, updates)
        with explain_leaves(call, updates):
            return tx.update(updates, state, like, **extra_args)

    init_fn = functools.partial(init_inside, call, tx)
    return guarded(tuple, init_fn, update_fn, Description(kind="other", inner=tx))


def description_of(tx: optax.GradientTransformation) -> Description:
    """The description of a transformation of ours; an empty one for any other."""
    return getattr(tx.update, "description", Description())


def _start(about: Description, rule: Rule, axis_names: AxisNames | None, params) -> ClipState:
    leaves = select(params, about.exclude)
    arrays, paths = leaves.arrays, leaves.paths
    # Norms of units are as different among devices as their leaves, and `lax.scan` wants the types
    # of the first state to be those of later ones. All else does not depend on the span, except
    # that inside `shard_map` a device may hold a few of all layers.
    typed = any(map(varying_axes, arrays))
    span = xla.find_span(arrays, paths, axis_names) if typed else xla.find_span((), (), ())
    layout = lay_out(about.scope, paths, leaves.shapes, span)
    norms = _zeros(layout, xla.accumulator(arrays))
    if layout.blocks.units:
        norms = xla.place_units(norms, layout, arrays)
    names, measured = pack_names(layout.blocks.names or ()), rule.measure is not None
    metrics = fresh_metrics(norms, names, measured=measured, bounded=rule.bounded)
    return ClipState(about.threshold.init(norms), metrics)


def _accept(guard: StateGuard, state: Any, updates: Any) -> ClipState:
    """Checks the state; None becomes a fresh state if the threshold has no history to lose."""
    # Optax's own clips are stateless, and code written for them passes None.
    if state is None:
        fresh = guard.init(updates)
        if not jax.tree.leaves(fresh.threshold):
            return fresh
    guard.check(state, updates)
    return state


# Cached, because an update without `jit` would sort the same leaves into blocks at every step. No
# entry holds an array or a tracer. The size is bounded, as each `scopes.groups()` is a new key.
@functools.lru_cache(maxsize=256)
def lay_out(scope: Scope, paths, shapes, span: xla.Span = xla.NOWHERE) -> xla.Layout:
    """The layout of a tree that is cut by a scope."""
    return xla.lay_out(scope.cut(paths, shapes), paths, shapes, span)


def _measure(about: Description, rule: Rule, leaves: Leaves, layout, params, dtype):
    """The norms of the updates, and of the parameters where the threshold may read them."""

    def norms_of(arrays):
        if rule.measure is None:
            return _zeros(layout, dtype)
        norms = rule.measure(leaves._replace(arrays=arrays), layout)
        # A state whose dtype changes cannot be carried through `lax.scan`.
        return jax.tree.map(lambda n: n.astype(dtype), norms)

    # This reads as many bytes again as the gradients, so only for thresholds that may use it.
    read = params is not None and reads_params(about.threshold)
    if about.view is None and not read:
        return norms_of(leaves.arrays), None
    own, seen = match_params(leaves, params, about.exclude, about.name), leaves.arrays
    if about.view is not None:
        seen = _look(about.view, leaves, own, layout.span)
    return norms_of(seen), norms_of(own) if read else None


def _look(view: View | SizedView, leaves: Leaves, own: list[jax.Array], span: xla.Span):
    """What is measured instead of the updates, given their parameters."""
    wide = [xla.widen(g) for g in leaves.arrays]
    if not isinstance(view, SizedView):
        return [view(g, xla.widen(w)) for g, w in zip(wide, own, strict=True)]
    # Not measured by the view itself, which sees only the part of a leaf that is on this device.
    sizes = xla.measure(view.norm, own, lay_out(leaf, leaves.paths, leaves.shapes, span))
    return [view.see(g, size) for g, size in zip(wide, sizes, strict=True)]


def _zeros(layout: xla.Layout, dtype) -> Norms:
    """Norms of zero, in the shape of the norms of a tree."""
    return jax.tree.map(lambda count: jnp.zeros(count.shape, dtype), xla.counts_of(layout, dtype))
