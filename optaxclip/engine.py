"""The one engine: measures, asks the threshold, acts, records.

Every clip is this engine with a scope, a threshold and a `Rule`, which says what is measured and
what is done. An update reads from top to bottom in `build`.
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
from optaxclip.record import Step, fresh_metrics, pack_names, record
from optaxclip.scopes import leaf, tree
from optaxclip.states import ParamsMemory, StateGuard, init_inside
from optaxclip.thresholds.blocks import hold, reads_params
from optaxclip.trees import Leaves, drop_gradientless, match_params, select


class Description(NamedTuple):
    """What a transformation is made of, for whoever reads a chain: `tx.update.description`.

    Attributes:
      scope, norm, threshold, action, view, exclude: as given to `clip_by`; None where there is no
        such part.
      nonfinite: as given to `clip_by`.
      kind: "blocks": each block is multiplied by what `action` says; "elements": each element is
        put between limits; "other": anything else, such as a clip with a memory.
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
    """What tells one clip from another, beside scope and threshold.

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
    """The clip that is made of a scope and a threshold, which `about` holds, and a rule."""
    validate.exclude(about.exclude)
    # Noted while the public call runs: at the update nobody knows any more which it was.
    about = about._replace(name=validate.called())
    memory = ParamsMemory(about.name, needed=about.scope is not tree)
    threshold = about.threshold

    def init_fn(params):
        with validate.speak_for(about.name):
            return _start(about, rule, memory.recall(params))

    guard = StateGuard(about.name, ClipState, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        with validate.speak_for(about.name):
            leaves = select(updates, about.exclude)
            state = _accept(guard, state, updates)
            step = functools.partial(clip, leaves)
            arrays, state = xla.call_in_auto_axes(step, leaves.arrays, (state, params, extra_args))
            return leaves.rebuild(arrays), state

    def clip(leaves: Leaves, arrays: list[jax.Array], rest: tuple[ClipState, Any, dict[str, Any]]):
        leaves, (state, params, extra_args) = leaves._replace(arrays=arrays), rest
        # What measures nothing has nothing to agree on with other devices, and needs no axis names.
        span = xla.NOWHERE
        if rule.measure is not None:
            span = xla.find_span(leaves.arrays, leaves.paths, axis_names)
        layout = lay_out(about.scope, leaves.paths, leaves.shapes, span)
        # The dtype of `init`, whose parameters may be wider than the gradients.
        known = jax.tree.leaves(state.metrics.clip_bound)
        dtype = known[0].dtype if known else xla.accumulator(leaves.arrays)
        norms, param_norms = _measure(about, rule, leaves, layout, params, dtype)
        # The names for thresholds by name; all that is said to a threshold of its scope.
        extra_args = {**extra_args, "block_names": layout.blocks.names}
        bounds, new = threshold.update(norms, state.threshold, param_norms, **extra_args)
        arrays, done = rule.act(leaves, layout, norms, bounds)
        # Here, and not in the thresholds: so a NaN moves none of them, the user's and Optax's
        # included.
        new = hold(threshold.init, norms, new, state.threshold)
        return arrays, ClipState(new, record(state.metrics, done))

    annotate(update_fn, description=about)
    return optax.GradientTransformationExtraArgs(guard.init, update_fn)


def chain(*parts: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """As `optax.chain`, for a public call that returns the whole, and speaks for it."""
    call, tx = validate.called(), optax.chain(*parts)
    init_fn = functools.partial(init_inside, call, tx)
    guard = StateGuard(call, tuple, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        like = drop_gradientless(params, updates)
        guard.check(state, like)
        return tx.update(updates, state, None if params is None else like, **extra_args)

    annotate(update_fn, description=Description(kind="other", name=call, inner=tx))
    return optax.GradientTransformationExtraArgs(guard.init, update_fn)


def description_of(tx: optax.GradientTransformation) -> Description:
    """How one of our own transformations describes itself."""
    return getattr(tx.update, "description", Description())


def _start(about: Description, rule: Rule, params: Any) -> ClipState:
    leaves = select(params, about.exclude)
    # Devices do not matter yet: they change how many elements a block has, not how many blocks.
    layout = lay_out(about.scope, leaves.paths, leaves.shapes)
    norms = _zeros(layout, xla.accumulator(leaves.arrays))
    names, measured = pack_names(layout.blocks.names or ()), rule.measure is not None
    metrics = fresh_metrics(norms, names, measured=measured, bounded=rule.bounded)
    return ClipState(about.threshold.init(norms), metrics)


def _accept(guard: StateGuard, state: Any, updates: Any) -> ClipState:
    """The state, if it is one for these updates; for None a fresh one, if no history is lost."""
    # Optax's own clips are stateless, and code that uses them passes None.
    if state is None:
        fresh = guard.init(updates)
        if not jax.tree.leaves(fresh.threshold):
            return fresh
    guard.check(state, updates)
    return state


# An update that is not jitted would sort the same leaves into blocks at every step. Nothing that is
# cached holds an array or a tracer. Bounded, as every `scopes.groups()` is a key of its own.
@functools.lru_cache(maxsize=256)
def lay_out(scope: Scope, paths, shapes, span: xla.Span = xla.NOWHERE) -> xla.Layout:
    """The layout of a tree, cut by a scope; kept, as each update without `jit` asks for it."""
    return xla.lay_out(scope.cut(paths, shapes), paths, shapes, span)


def _measure(about: Description, rule: Rule, leaves: Leaves, layout, params, dtype):
    """The norms of the updates, and of the parameters where the threshold may read them."""

    def norms_of(arrays):
        if rule.measure is None:
            return _zeros(layout, dtype)
        norms = rule.measure(leaves._replace(arrays=arrays), layout)
        # A state that changes its dtype cannot be carried through `lax.scan`.
        return jax.tree.map(lambda n: n.astype(dtype), norms)

    # A second read of as many bytes as the gradients: only for thresholds that may look at it.
    read = params is not None and reads_params(about.threshold)
    if about.view is None and not read:
        return norms_of(leaves.arrays), None
    own, seen = match_params(leaves, params, about.exclude, about.name), leaves.arrays
    if about.view is not None:
        seen = _look(about.view, leaves, own, layout.span)
    return norms_of(seen), norms_of(own) if read else None


def _look(view: View | SizedView, leaves: Leaves, own: list[jax.Array], span: xla.Span):
    """What is measured in place of the updates, given their parameters."""
    wide = [xla.widen(g) for g in leaves.arrays]
    if not isinstance(view, SizedView):
        return [view(g, xla.widen(w)) for g, w in zip(wide, own, strict=True)]
    # Not by the view: of a leaf that is spread over devices it would see one part.
    sizes = xla.measure(view.norm, own, lay_out(leaf, leaves.paths, leaves.shapes, span))
    return [view.see(g, size) for g, size in zip(wide, sizes, strict=True)]


def _zeros(layout: xla.Layout, dtype) -> Norms:
    """Norms of zero, in the shape of the norms of a tree."""
    return jax.tree.map(lambda count: jnp.zeros(count.shape, dtype), xla.counts_of(layout, dtype))
