"""Where the four parts meet.

Every clip in this library answers four questions, and each answer is a part of its own:

    scope      which numbers share one norm?          tree, leaf, groups, units
    norm       how long is a block?                   l2, l1, linf, rms, lp(p)
    threshold  how long may it be?                    a number, a schedule, or a transformation of norms into bounds
    action     what is done about one that is longer? rescale, normalize, zero, smooth(p), band(low)

Data goes one way, once: the updates are cut into blocks and measured in one read, the threshold makes bounds of the
norms, the action makes factors of both, and each leaf is multiplied by the factor of its block.

    updates --cut, measure--> norms --threshold--> bounds --action--> factors --multiply--> updates

Norms, bounds and factors have one shape (a scalar, a vector, or a list of small arrays), so no part needs to know which
scope it serves.  The one multiply is what XLA fuses into the optimizer that follows; a division, a select or a `cond`
on the tree would keep a copy of all gradients.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optaxclip.actions import Action, as_action
from optaxclip.apply import Factors, Nonfinite, factors_of, multiply
from optaxclip.leaves import Exclude, Leaves, as_exclude, map_blocks, measured_leaves
from optaxclip.measure import Measured, measure
from optaxclip.mesh import AxisNames, find_span
from optaxclip.norms import Norm, accumulator, as_norm, l2, widen
from optaxclip.record import Metrics, Step, fresh_metrics, named_blocks, recorded
from optaxclip.scopes import Cut, Scope, as_scope, tree
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite

View = Callable[[jax.Array, jax.Array], jax.Array]


class ClipState(NamedTuple):
    """State of every clip.

    Attributes:
      threshold: the state of the threshold.
      metrics: what the clip did, see `Metrics`; read it with `optaxclip.metrics`.
    """

    threshold: optax.OptState
    metrics: Metrics


def clip_by(
    threshold: Threshold,
    *,
    scope: Scope = tree,
    norm: Norm | float = l2,
    action: Action | None = None,
    view: View | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each block of the updates to its bound: g ← g · action(‖g‖, bound).

    Args:
      threshold: the bound: a number from 0 to inf, an array or tracer, a schedule (a function of the step), or a
        threshold, which is an optax transformation of norms into bounds.
      scope: which numbers share one norm: `tree`, `leaf`, `groups(label)`, `units(axes)`.
      norm: how long a block is: `l2`, `l1`, `linf`, `rms`, or a number p for the p-norm.
      action: what is done: `rescale` (None: `optax.inject_hyperparams` takes a function for a schedule, so none is the
        default), `normalize`, `zero`, `smooth(p)`, `band(low)`, or a function `(norms, bounds) -> factors`.
      view: what is measured in place of the updates: a function of a leaf and its parameters, both in float32 at least,
        that returns an array of that shape; for example `lambda g, w: g / (abs(w) + 1e-3)`.
      exclude: leaves to leave alone, neither measured nor changed: a regular expression searched in the path, or a
        predicate of the path.
      nonfinite: what becomes of a block with NaN or inf in it: "propagate" makes all of it NaN, "zero" makes all of it
        exact zeros. No statistic of a threshold moves either way.
      axis_names: inside `shard_map(check_vma=False)`, `pmap` or `vmap(axis_name=...)`, the mesh axes over which the
        gradients are spread: a name or tuple of names, a function of the path, or a tree of these. () if they are
        already the same on every device. Not needed under plain `jit`, nor where `shard_map` keeps types.

    Returns:
      A `GradientTransformationExtraArgs` with a `ClipState`. `update(updates, None)` starts from a fresh state where
      the threshold keeps none.

    Raises:
      ValueError: for a threshold that is negative, NaN, a boolean or a string; for a scope, norm, action, `exclude`
        or `nonfinite` that is none; at the update, for the state of something else, if the tree's blocks are not those
        of `init`, or if the parameters are needed and not passed.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by(1.0, scope=optaxclip.leaf, action=optaxclip.smooth(1.0))
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([1.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'a': Array([0.75], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    threshold = as_threshold(threshold, "clip_by", "threshold")
    scope, norm = as_scope(scope, "clip_by"), as_norm(norm, "clip_by")
    action, exclude = as_action(action, "clip_by"), as_exclude(exclude, "clip_by")
    if nonfinite not in ("propagate", "zero"):
        raise ValueError(f"clip_by: nonfinite must be 'propagate' or 'zero', got {nonfinite!r}.")

    def cut(paths, arrays) -> Cut:
        return scope.cut(paths, [x.shape for x in arrays])

    # Compiled, so that a clip that is called without jit takes a few calls of what is compiled once.
    factor_rule = jax.jit(functools.partial(factors_of, action=action, nonfinite=nonfinite), inline=True)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def measured(paths: tuple[str, ...], arrays: list[jax.Array]) -> Measured:
        span = find_span(arrays, paths, axis_names)
        return measure(norm, arrays, cut(paths, arrays), span)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def multiplied(paths: tuple[str, ...], arrays: list[jax.Array], factors: Factors) -> list[jax.Array]:
        return multiply(arrays, factors, cut(paths, arrays), nonfinite)

    def init_fn(params):
        leaves = measured_leaves(params, exclude)
        blocks, dtype = cut(leaves.paths, leaves.arrays), accumulator(leaves.arrays)
        norms = jax.tree.map(lambda n: jnp.zeros(n.shape, dtype), blocks.count([1] * len(leaves.arrays)))
        return ClipState(threshold.init(norms), fresh_metrics(norms, named_blocks(params, blocks.names, scope.named)))

    def update_fn(updates, state, params=None, **extra_args):
        leaves = measured_leaves(updates, exclude)
        state = _fresh_if_none(state, init_fn, updates)
        check_names(cut(leaves.paths, leaves.arrays).names, state.metrics.blocks)
        seen = leaves.arrays if view is None else _viewed(view, leaves, params, exclude)
        found = measured(leaves.paths, seen)
        norms = jax.tree.map(lambda n: n.astype(state.metrics.grad_norm.dtype), found.norms)

        def param_norms() -> Any:
            return measured(leaves.paths, params_of(leaves, params, exclude)).norms

        bounds, new = threshold.update(norms, state.threshold, cast(Any, param_norms), **extra_args)
        factors = Factors(*map_blocks(factor_rule, 5, found.lengths, found.units, bounds))
        clipped = multiplied(leaves.paths, leaves.arrays, factors)
        metrics = recorded(state.metrics, Step(norms, bounds, factors.factor, factors.clipped))
        return leaves.rebuild(clipped), ClipState(hold_where_not_finite(norms, new, state.threshold), metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fresh_if_none(state, init_fn, updates) -> ClipState:
    """The state, or a fresh one for None, if no history is lost by that."""
    if state is not None:
        check_state(state)
        return state
    state = init_fn(updates)
    if jax.tree.leaves(state.threshold):
        raise ValueError(
            "The threshold of this clip has a history, and update was called with the state None. Write"
            " state = tx.init(params) once, and updates, state = tx.update(grads, state, params) at every step."
        )
    return state


def check_state(state: Any) -> None:
    """Raises unless the state has the fields of a clip's. Its type may be one that a checkpoint library made."""
    if not all(hasattr(state, field) for field in ClipState._fields):
        raise ValueError(
            f"This is not the state of a clip but {_kind(state)}: initialise with state = tx.init(params). For a"
            " checkpoint from before the clip see docs/old-checkpoints.md."
        )


def _kind(state: Any) -> str:
    """The type of a state; of a plain tuple, what is in it."""
    return f"({', '.join(map(_kind, state))})" if type(state) is tuple else type(state).__name__


def check_names(names, known) -> None:
    """Raises unless the blocks of the updates are those that `init` saw."""
    if bool(names) != bool(known):
        named, other = ("the updates", "the state") if names else ("the state", "the updates")
        raise ValueError(
            f"The blocks of {named} have names, those of {other} have none: this is the state of a clip with another"
            " scope (or of a tree without gradients). Initialise with tx.init(params) of this clip."
        )
    new, missing = sorted(set(names) - set(known)), sorted(set(known) - set(names))
    if new or missing:
        raise ValueError(
            f"The blocks of the updates are not those of tx.init(params): new are {new}, missing are {missing}."
            " Initialise with the tree that is updated."
        )


def _viewed(view: View, leaves: Leaves, params, exclude: Exclude) -> list[jax.Array]:
    """What is measured in place of the updates."""
    return [view(widen(g), widen(w)) for g, w in zip(leaves.arrays, params_of(leaves, params, exclude), strict=True)]


def params_of(leaves: Leaves, params, exclude: Exclude) -> list[jax.Array]:
    """The parameters that belong to the measured updates, found by path."""
    if params is None:
        raise ValueError(
            "This clip needs the parameters: write tx.update(grads, state, params), not tx.update(grads, state)."
        )
    own = measured_leaves(params, exclude)
    by_path = dict(zip(own.paths, own.arrays, strict=True))
    for path, x in zip(leaves.paths, leaves.arrays, strict=True):
        if path not in by_path or by_path[path].shape != x.shape:
            seen = f"has shape {by_path[path].shape}" if path in by_path else "is missing"
            raise ValueError(f"The update {path!r} has shape {x.shape}, but among the parameters it {seen}.")
    return [by_path[path] for path in leaves.paths]
