"""Skips a step: the optimizer always runs, and its effect is undone if the step is skipped.

A `cond` around the optimizer would copy the whole state, and a GPU would wait for the host to read
the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.engine import description_of, guarded, lay_out
from optaxclip.scopes import tree
from optaxclip.states import explain_leaves, init_inside
from optaxclip.thresholds.blocks import hold
from optaxclip.trees import drop_gradientless, is_measured, path_string

# Why a step was skipped, in `SkipState.last_reason`.
NORM, LOSS, NONFINITE = 1, 2, 3


class SkipState(NamedTuple):
    """State of `skip_spikes` and `skip_nonfinite`.

    Attributes:
      skipped_steps: int32, the steps that were skipped.
      consecutive_skips: int32, the skips since the last step that was taken.
      last_reason: int32, why the last skip happened: 1 the norm was over its bound, 2 the loss was
        over its bound, 3 one of them was not finite; 0 if no step has been skipped yet.
      spike: a `ClipState`: the threshold of the norms, its metrics, and the number of all steps.
      loss: the threshold of the losses.
      inner: the state of the optimizer.
    """

    skipped_steps: jax.Array
    consecutive_skips: jax.Array
    last_reason: jax.Array
    spike: Any
    loss: optax.OptState
    inner: optax.OptState


class _Verdict(NamedTuple):
    """The reason to skip a step (0: none), and the new states of both thresholds."""

    reason: jax.Array
    spike: Any
    loss: Any


def _judge(watch, loss_rule, updates, state: SkipState, params, loss, passed) -> _Verdict:
    """Compares norm and loss with their bounds. `watch` is a clip that changes nothing."""
    _, spike = watch.update(updates, state.spike, params, **passed)
    finite, over = jnp.isfinite(spike.metrics.grad_norm), spike.metrics.clipped_share > 0
    reason, loss_state = jnp.where(over, NORM, 0), state.loss
    if loss is not None:
        loss = jnp.asarray(loss).astype(jnp.float32)
        bound, new = loss_rule.update(loss, state.loss, **passed)
        # This threshold is not run by the engine, and one written by a user may learn NaN.
        loss_state = hold(loss_rule.init, loss, new, state.loss)
        reason = jnp.where(~over & (loss > bound), LOSS, reason)
        finite = finite & jnp.isfinite(loss)
    return _Verdict(jnp.where(finite, reason, NONFINITE).astype(jnp.int32), spike, loss_state)


def _decide(verdict: _Verdict, state: SkipState, new: Any, fresh: tuple[Any, Any], most: ArrayLike):
    """Decides whether to skip. `new` is the optimizer's state, `fresh` that of the thresholds."""
    # The thresholds are reset as well: fed only with accepted norms, they would never learn the new
    # scale.
    locked_out = (verdict.reason != NONFINITE) & (state.consecutive_skips >= most)
    reset, skip = (verdict.reason > 0) & locked_out, (verdict.reason > 0) & ~locked_out
    spike = verdict.spike
    # Thresholds are also updated at a skipped step: their feed decides what they learn of a spike.
    return skip, SkipState(
        jnp.where(skip, optax.safe_increment(state.skipped_steps), state.skipped_steps),
        jnp.where(skip, optax.safe_increment(state.consecutive_skips), 0),
        jnp.where(skip, verdict.reason, state.last_reason),
        spike._replace(threshold=_select(reset, fresh[0].threshold, spike.threshold)),
        _select(reset, fresh[1], verdict.loss),
        _select(skip, state.inner, new),
    )


def skip_by(
    inner: optax.GradientTransformationExtraArgs,
    watch: optax.GradientTransformationExtraArgs,
    loss_rule: optax.GradientTransformationExtraArgs,
    most: ArrayLike,
    *,
    needs_loss: bool,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner`, and undoes its effect if the step is to be skipped.

    Args:
      inner: the optimizer.
      watch: a clip that changes nothing, with the threshold of norms.
      loss_rule: the threshold of losses.
      most: how many consecutive steps with finite norm and loss may be skipped.
      needs_loss: whether an update without a loss is an error.
    """
    call = validate.called()

    def thresholds(params):
        return watch.init(params), loss_rule.init(jnp.zeros(()))

    def init_fn(params):
        # Separate arrays, because two leaves that share a buffer cannot be donated.
        skipped, row, reason = (jnp.zeros((), jnp.int32) for _ in range(3))
        inside = init_inside(call, inner, params)
        return SkipState(skipped, row, reason, *thresholds(params), inside)

    def update_fn(updates, state, params, **extra_args):
        loss = find_loss(extra_args)
        if needs_loss and loss is None:
            raise ValueError(
                f"{call}: loss_threshold needs a loss: write"
                " tx.update(grads, state, params, loss=loss)."
            )
        with validate.speak_for(call):
            verdict = _judge(watch, loss_rule, updates, state, params, loss, extra_args)
        with explain_leaves(call, updates):
            steps, new = inner.update(updates, state.inner, params, **extra_args)
        # Computed here and not kept: otherwise every checkpoint would hold the thresholds twice.
        fresh = thresholds(drop_gradientless(params, updates))
        skip, state = _decide(verdict, state, new, fresh, most)
        # A select, not a product with 0: the updates of a gradient that contains NaN are NaN.
        return _select(skip, optax.tree.zeros_like(steps), steps), state

    about = description_of(watch)._replace(inner=inner)
    return guarded(SkipState, init_fn, update_fn, about)


def find_loss(passed: Mapping[str, Any]) -> Any:
    """Finds the loss passed to an update, if any; Optax's line searches call it `value`."""
    loss = passed.get("loss")
    return passed.get("value") if loss is None else loss


def multiply(updates: Any, factor: jax.Array) -> Any:
    """Multiplies the updates by one factor, each in its own dtype; integers are left alone."""

    def times(update):
        # Rounded once, at the end: a factor in the dtype of the update would be rounded as well.
        return xla.as_dtype_of(update, xla.times(xla.widen(update), factor))

    return jax.tree.map(lambda u: times(jnp.asarray(u)) if is_measured(u) else u, updates)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Selects one of two trees. Unlike a `cond`, this fuses and allows any types in `shard_map`."""
    found, structure = jax.tree_util.tree_flatten_with_path(yes)
    paths = [path_string(path) for path, _ in found]
    shapes = [jnp.shape(leaf) for _, leaf in found]
    # One entry per leaf, like the factors of a clip. An AdamW step of GPT-2 small takes 70 kernels
    # on a GPU this way, and 193 with a single scalar.
    layout = lay_out(tree, tuple(paths), tuple(shapes))
    each = zip(
        xla.spread(condition, layout), jax.tree.leaves(yes), jax.tree.leaves(no), strict=True
    )
    return structure.unflatten([jnp.where(chosen, a, b) for chosen, a, b in each])
