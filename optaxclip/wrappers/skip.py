"""Wrappers that skip whole optimizer steps: no parameters, moments, counters or statistics move.

A clip in a chain can only make a bad gradient zero; the optimizer behind it still steps, its
moments decay and its momentum moves the parameters. To skip a step the optimizer's state must be
put back, and that takes a wrapper.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.actions import keep
from optaxclip.base import AxisNames, Exclude, Norm, Threshold, annotate
from optaxclip.core import clip_by
from optaxclip.engine import description_of
from optaxclip.norms import l2
from optaxclip.states import StateGuard
from optaxclip.thresholds.blocks import hold
from optaxclip.thresholds.fixed import as_threshold, unchecked
from optaxclip.thresholds.quantile import window_zscore

# Why a step was skipped, in `SkipState.last_reason`.
NORM, LOSS, NONFINITE = 1, 2, 3


class SkipState(NamedTuple):
    """State of `skip_spikes` and `skip_nonfinite`.

    Attributes:
      skipped_steps: int32, the steps that were skipped.
      consecutive_skips: int32, those since the last step that was taken.
      last_reason: int32, why the last of them was skipped: 1 its norm was over the bound, 2 its
        loss was, 3 one of both was not finite; 0 if none was skipped yet.
      spike: a `ClipState`: the threshold of the norms, what was seen, and the number of all steps.
      loss: the threshold of the losses.
      inner: the state of the optimizer.
    """

    skipped_steps: jax.Array
    consecutive_skips: jax.Array
    last_reason: jax.Array
    spike: Any
    loss: optax.OptState
    inner: optax.OptState


@validate.named
def skip_spikes(
    inner: optax.GradientTransformation,
    threshold: Threshold | None = None,
    *,
    loss_threshold: Threshold | None = None,
    max_consecutive_skips: ArrayLike = 100,
    norm: Norm | float = l2,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradient norm, or loss, is over its threshold or not finite.

    A skipped step has updates of zero, and leaves the state of `inner` as it was. The rules of
    production are thresholds like any other:

    - a constant: `skip_spikes(optimizer, 2.0)`;
    - mean + 6σ of the last 128, from the 64th step on (OLMo): `thresholds.window_zscore()`, the
      default, for norms and, if `update` is passed the loss, for losses;
    - k times a running mean of what was accepted (axlearn): `thresholds.running(20.0,
      feed=feeds.accepted)`;
    - the log z-score, fed with spikes at the length of their bound (Lingvo):
      `thresholds.log_zscore(4.0, 0.995, update_first=False, target="threshold",
      feed=feeds.clipped, warmup_steps=100)`.

    Args:
      inner: the optimizer, or a chain with a clip in it: the norm is that of the gradient before
        any clip inside.
      threshold: of norms: a number, schedule or threshold; None: `thresholds.window_zscore(6.0,
        128)`.
      loss_threshold: of losses, in the same forms; None: `thresholds.window_zscore(6.0, 128,
        signed=True)` if a loss is passed.
      max_consecutive_skips: after so many consecutive skips the next finite gradient is taken,
        whatever its norm, and the thresholds are reset: a run is never locked out by a change of
        scale. Gradients that are not finite are never taken.
      norm, exclude, axis_names: as in `optaxclip.clip_by`.

    Returns:
      A transformation whose `update` takes the loss as `loss=`, or as `value=` (as Optax's line
      searches do), beside what `inner` takes, and passes all of it on.

    Raises:
      ValueError: for an `inner` that is no optimizer, a bad threshold, a transformation of
        gradients in place of one, or `max_consecutive_skips` below 1; at the update, if there is a
        `loss_threshold` and no loss.

    Deviations: losses and norms that are not finite never enter a statistic (in OLMo's code one of
    them makes it skip 128 steps, in Levanter's it turns the test off). Under `optax.MultiSteps`,
    put this inside: it then judges the mean.

    Under plain `jit` on several devices there is one decision; under `shard_map` the norm spans the
    devices, and the loss must be the same on all (`lax.pmean`).

    References:
      OLMo-core's SkipStepOptimizer; `Lingvo <https://arxiv.org/abs/1902.08295>`_'s GradNormTracker;
      axlearn's skip_and_clip_by_global_norm

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optaxclip.skip_spikes(optax.sgd(1.0, momentum=0.9), 10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 99.0, 1.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates, state.skipped_steps)
    [-1.] 0
    [0.] 1
    [-1.9] 1
    """
    _refuse_chain(inner, threshold)
    inner = validate.as_optimizer(inner)
    validate.at_least(1, max_consecutive_skips=max_consecutive_skips)
    rule = window_zscore() if threshold is None else as_threshold(threshold=threshold)
    loss_rule = window_zscore(signed=True)
    if loss_threshold is not None:
        loss_rule = as_threshold(loss_threshold=loss_threshold)
    watch = clip_by(rule, norm=norm, action=keep, exclude=exclude, axis_names=axis_names)
    needs_loss = loss_threshold is not None
    return _skip(inner, watch, loss_rule, max_consecutive_skips, needs_loss=needs_loss)


@validate.named
def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients are not finite, for as long as it takes.

    A skipped step has updates of zero, and leaves the state of `inner` as it was. Unlike
    `optax.apply_if_finite`, which applies a NaN after some number of them; `consecutive_skips` in
    the state tells a loop when to give up. If `update` is passed the loss, as `loss=` or `value=`,
    it must be finite, too.

    Args:
      inner: the optimizer, or a chain.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for an `inner` that is no optimizer.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optaxclip.skip_nonfinite(optax.sgd(1.0, momentum=0.9))
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, jnp.nan, 1.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates, state.skipped_steps)
    [-1.] 0
    [0.] 1
    [-1.9] 1
    """
    inner = validate.as_optimizer(inner)
    watch = clip_by(math.inf, action=keep, exclude=exclude, axis_names=axis_names)
    return _skip(inner, watch, unchecked(math.inf), 1, needs_loss=False)


def _refuse_chain(inner: Any, threshold: Any) -> None:
    """Raises for `skip_spikes(clip, optimizer)`, by somebody who takes it for a chain.

    An optimizer is a transformation, as thresholds are; it is known by the moments in its state.
    """
    if not (validate.is_transformation(inner) and validate.is_transformation(threshold)):
        return
    call = validate.called()
    is_clip = getattr(inner.update, "description", None) is not None
    state = jax.eval_shape(threshold.init, jax.ShapeDtypeStruct((), jnp.float32))
    has_moments = any(optax.tree.get_all_with_path(state, name) for name in ("mu", "nu", "trace"))
    if is_clip or has_moments:
        raise ValueError(
            f"{call}: the second argument is a threshold of norms, no transformation of gradients."
            f" {call} holds one optimizer: put a clip into a chain with it,"
            f" {call}(optax.chain(clip, optimizer), threshold)."
        )


class _Verdict(NamedTuple):
    """The reason to skip a step (0: none), and the new states of both thresholds."""

    reason: jax.Array
    spike: Any
    loss: Any


def _judge(watch, loss_rule, updates, state: SkipState, params, loss, passed) -> _Verdict:
    """Holds norm and loss to their bounds. `watch` is a clip that changes nothing."""
    _, spike = watch.update(updates, state.spike, params, **passed)
    finite, over = jnp.isfinite(spike.metrics.grad_norm), spike.metrics.clipped_share > 0
    reason, loss_state = jnp.where(over, NORM, 0), state.loss
    if loss is not None:
        loss = jnp.asarray(loss).astype(jnp.float32)
        bound, new = loss_rule.update(loss, state.loss, **passed)
        loss_state = hold(loss_rule.init, loss, new, state.loss)
        reason = jnp.where(~over & (loss > bound), LOSS, reason)
        finite = finite & jnp.isfinite(loss)
    return _Verdict(jnp.where(finite, reason, NONFINITE).astype(jnp.int32), spike, loss_state)


def _decide(verdict: _Verdict, state: SkipState, new: Any, fresh: tuple[Any, Any], most: ArrayLike):
    """Whether to skip, and the state after. `new` is the optimizer's, `fresh` the thresholds'."""
    locked_out = (verdict.reason != NONFINITE) & (state.consecutive_skips >= most)
    reset, skip = (verdict.reason > 0) & locked_out, (verdict.reason > 0) & ~locked_out
    spike = verdict.spike
    return skip, SkipState(
        jnp.where(skip, optax.safe_increment(state.skipped_steps), state.skipped_steps),
        jnp.where(skip, optax.safe_increment(state.consecutive_skips), 0),
        jnp.where(skip, verdict.reason, state.last_reason),
        spike._replace(threshold=_select(reset, fresh[0].threshold, spike.threshold)),
        _select(reset, fresh[1], verdict.loss),
        _select(skip, state.inner, new),
    )


def _skip(inner, watch, loss_rule, most: ArrayLike, *, needs_loss: bool):
    """Runs `inner`, and takes back what it did where the step is to be skipped."""
    call = validate.called()

    def thresholds(params):
        return watch.init(params), loss_rule.init(jnp.zeros(()))

    def init_fn(params):
        skipped, row, reason = (jnp.zeros((), jnp.int32) for _ in range(3))
        return SkipState(skipped, row, reason, *thresholds(params), inner.init(params))

    guard = StateGuard(call, SkipState, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        guard.check(state, updates if params is None else params)
        loss = extra_args.get("loss")
        loss = extra_args.get("value") if loss is None else loss
        if needs_loss and loss is None:
            raise ValueError(
                f"{call}: there is a loss_threshold: write"
                " tx.update(grads, state, params, loss=loss)."
            )
        verdict = _judge(watch, loss_rule, updates, state, params, loss, extra_args)
        steps, new = inner.update(updates, state.inner, params, **extra_args)
        fresh = thresholds(updates if params is None else params)
        skip, state = _decide(verdict, state, new, fresh, most)
        return jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), steps), state

    annotate(update_fn, description=description_of(watch)._replace(inner=inner))
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees. Unlike a `cond`, a select fuses, and takes any types in `shard_map`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
