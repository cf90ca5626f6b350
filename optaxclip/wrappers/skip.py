"""Wrappers that skip whole optimizer steps: no parameters, moments, counters or statistics move.

A clip in a chain can only make a bad gradient zero. The optimizer after it still takes a step: its
moments decay, and its momentum moves the parameters. Skipping a step means restoring the
optimizer's state, and that takes a wrapper.
"""

from __future__ import annotations

import math
from typing import Any

import optax
from jax.typing import ArrayLike

from optaxclip import thresholds, validate
from optaxclip.actions import keep
from optaxclip.base import AxisNames, Exclude, Norm, Threshold
from optaxclip.core import clip_by
from optaxclip.norms import l2
from optaxclip.thresholds.convert import as_threshold, is_of_gradients
from optaxclip.thresholds.fixed import unchecked
from optaxclip.wrappers.steps import skip_by


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

    A skipped step has updates of zero and leaves the state of `inner` unchanged. Rules used in
    production are thresholds like any other:

    - a constant: `skip_spikes(optimizer, 2.0)`;
    - mean + 6σ of the last 128 steps, from the 64th step on (OLMo): `thresholds.window_zscore()`,
      the default, for norms and, if the loss is passed to `update`, for losses;
    - k times a running mean of accepted norms (axlearn): `thresholds.running(20.0,
      feed=feeds.accepted)`;
    - the log z-score, fed with spikes clipped to their bound (Lingvo):
      `thresholds.log_zscore(4.0, 0.995, update_first=False, target="threshold",
      feed=feeds.clipped, warmup_steps=100)`.

    Args:
      inner: the optimizer, or a chain with a clip in it: the norm is that of the gradient before
        any clip inside.
      threshold: for norms: a number, schedule or threshold; None: `thresholds.window_zscore(6.0,
        128)`.
      loss_threshold: for losses, in the same forms; None: `thresholds.window_zscore(6.0, 128,
        signed=True)` if a loss is passed.
      max_consecutive_skips: after this many consecutive skips the next finite gradient is taken,
        whatever its norm, and the thresholds are reset, so that a change of scale never locks a run
        out. Gradients that are not finite are never taken.
      norm, exclude, axis_names: as in `optaxclip.clip_by`.

    Returns:
      A transformation whose `update` takes the loss as `loss=`, or as `value=` (as Optax's line
      searches do), in addition to what `inner` takes, and passes all of it on.

    Raises:
      ValueError: for an `inner` that is not an optimizer, a bad threshold, a transformation of
        gradients instead of one, or `max_consecutive_skips` below 1; at the update, if there is a
        `loss_threshold` but no loss.

    Deviations: losses and norms that are not finite never enter a statistic (in OLMo's code one of
    them causes 128 skips, in Levanter's it turns the test off). With `optax.MultiSteps`, put this
    inside, where it tests the mean. MultiSteps keeps a NaN of one micro-batch in that mean
    forever: give it `should_skip_update_fn=optax.skip_not_finite`.

    Under plain `jit` on several devices there is one decision. Under `shard_map` the norm spans the
    devices, and the loss must be the same on all of them (`lax.pmean`).

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
    validate.steps(1, max_consecutive_skips=max_consecutive_skips)
    rule = thresholds.window_zscore() if threshold is None else as_threshold(threshold=threshold)
    # Signed, because a loss such as a log-likelihood may be negative. Made even if no loss is ever
    # passed, because `init` cannot know that.
    loss_rule = thresholds.window_zscore(signed=True)
    if loss_threshold is not None:
        loss_rule = as_threshold(loss_threshold=loss_threshold)
    # A clip that changes nothing, so that norms, thresholds and the record need no second engine.
    watch = clip_by(rule, norm=norm, action=keep, exclude=exclude, axis_names=axis_names)
    needs_loss = loss_threshold is not None
    return skip_by(inner, watch, loss_rule, max_consecutive_skips, needs_loss=needs_loss)


@validate.named
def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients are not finite, for as long as it takes.

    A skipped step has updates of zero and leaves the state of `inner` unchanged.
    `optax.apply_if_finite`, in contrast, applies a NaN after a number of them. `consecutive_skips`
    in the state tells a loop when to give up. If the loss is passed to `update`, as `loss=` or
    `value=`, it must be finite, too.

    Args:
      inner: the optimizer, or a chain.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for an `inner` that is not an optimizer.

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
    # The limit of 1 has no effect: a finite norm never exceeds an infinite bound.
    return skip_by(inner, watch, unchecked(math.inf), 1, needs_loss=False)


def _refuse_chain(inner: Any, threshold: Any) -> None:
    """Raises for `skip_spikes(clip, optimizer)`, written as if it were a chain."""
    # A bad `inner` alone is left to a later check with its own error.
    both = validate.is_transformation(inner) and validate.is_transformation(threshold)
    if both and is_of_gradients(threshold):
        call = validate.called()
        raise ValueError(
            f"{call}: the second argument must be a threshold of norms, not a transformation of"
            f" gradients. {call} wraps one optimizer: put the clip into a chain with it,"
            f" {call}(optax.chain(clip, optimizer), threshold)."
        )
