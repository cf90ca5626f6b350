"""What must hold the optimizer: a skipped step moves nothing, no parameters, no moments, no counters, no statistics.

A clip in a chain can only make a bad gradient zero; the optimizer behind it still steps, its moments decay and its
momentum moves the parameters.  To skip a step its state must be put back, and that takes a wrapper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.core import clip_by
from optaxclip.given import as_optimizer
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.norms import Norm, l2
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite
from optaxclip.thresholds.fixed import unchanging
from optaxclip.thresholds.learned import number
from optaxclip.thresholds.quantile import window_zscore


class SkipState(NamedTuple):
    """State of `skip_spikes` and `skip_nonfinite`.

    Attributes:
      skipped_steps: int32, the steps that were skipped.
      consecutive_skips: int32, those without a step taken since, up to now.
      spike: a `ClipState`: the threshold of the norms, and what was seen (read it with `optaxclip.metrics`).
      loss: the threshold of the losses.
      inner: the state of the optimizer.
    """

    skipped_steps: jax.Array
    consecutive_skips: jax.Array
    spike: Any
    loss: optax.OptState
    inner: optax.OptState


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
    """Skips steps whose gradient norm, or loss, is over its threshold or not finite: no update, `inner` untouched.

    The rules of production are thresholds like any other:

    - mean + 6σ of the last 128, after 64 (OLMo): `window_zscore()`, the default, for norms and, if `update` is passed
      `loss=`, for losses;
    - a constant: 100.0;
    - k times a running mean of what was accepted (axlearn): `running(20.0, feed=accepted)`;
    - the log z-score, fed with spikes at the length of their bound (Lingvo): `log_zscore(4.0, 0.995, order="after",
      target="threshold", feed=clipped, warmup_steps=100)`.

    Args:
      inner: the optimizer, or a chain with a clip in it: the norm is that of the gradient before any clip inside.
      threshold: of norms: a number, schedule or threshold; None: `window_zscore(6.0, 128)`.
      loss_threshold: of losses, in the same forms; None: `window_zscore(6.0, 128, signed=True)` if a loss is passed.
      max_consecutive_skips: after so many skips without a break the next finite gradient is taken, whatever its norm,
        and the thresholds start anew: a run is never locked out by a change of scale. Gradients that are not finite
        are never taken.
      norm, exclude, axis_names: as in `optaxclip.clip_by`.

    Returns:
      A transformation whose `update` takes `loss=` beside what `inner` takes, and passes all of it on.

    Raises:
      ValueError: for an `inner` that is no optimizer, a bad threshold, or `max_consecutive_skips` below 1; at the
        update, if there is a `loss_threshold` and no `loss=`.

    Deviations: losses and norms that are not finite never enter a statistic (in OLMo's code one of them makes it skip
    128 steps, in Levanter's it turns the test off). Under `optax.MultiSteps`, put this inside: it then judges the mean.

    Under plain `jit` on several devices there is one decision; under `shard_map` the norm spans the devices, and the
    loss must be the same on all (`lax.pmean`).

    References:
      OLMo-core's SkipStepOptimizer; `Lingvo <https://arxiv.org/abs/1902.08295>`_'s GradNormTracker; axlearn's
      skip_and_clip_by_global_norm

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
    inner = as_optimizer(inner, "skip_spikes")
    most = number(max_consecutive_skips, "skip_spikes", "max_consecutive_skips", 1)
    rule = window_zscore() if threshold is None else as_threshold(threshold, "skip_spikes", "threshold")
    loss_rule = window_zscore(signed=True) if loss_threshold is None else loss_threshold
    loss_rule = as_threshold(loss_rule, "skip_spikes", "loss_threshold")
    watch = clip_by(rule, norm=norm, action=_leave_alone, exclude=exclude, axis_names=axis_names)
    skipping = _skipping(inner, watch, loss_rule, most)

    def update_fn(updates, state, params=None, *, loss=None, **extra_args):
        if loss is None and loss_threshold is not None:
            raise ValueError(
                "skip_spikes: there is a loss_threshold: write tx.update(grads, state, params, loss=loss)."
            )
        return skipping.update(updates, state, params, loss=loss, **extra_args)

    return optax.GradientTransformationExtraArgs(skipping.init, update_fn)


def _skipping(inner: optax.GradientTransformationExtraArgs, watch, loss_rule, most: ArrayLike):
    """Skips what is over the bound of `watch`, a clip that changes nothing, or whose loss is over that of its rule."""

    def thresholds(params):
        return watch.init(params), loss_rule.init(jnp.zeros(()))

    def init_fn(params):
        return SkipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), *thresholds(params), inner.init(params))

    def judge(updates, state, params, loss, passed):
        """Whether the step is over a bound, whether it is finite, and the new states of both thresholds."""
        _, spike = watch.update(updates, state.spike, params, **passed)
        over, finite = spike.metrics.clipped_share > 0, jnp.isfinite(spike.metrics.grad_norm)
        if loss is None:
            return over, finite, spike, state.loss
        loss = jnp.asarray(loss).astype(jnp.float32)
        bound, loss_state = loss_rule.update(loss, state.loss, **passed)
        loss_state = hold_where_not_finite(loss, loss_state, state.loss)
        return over | (loss > bound), finite & jnp.isfinite(loss), spike, loss_state

    def update_fn(updates, state, params=None, *, loss=None, **extra_args):
        passed = extra_args if loss is None else extra_args | {"loss": loss}
        over, finite, spike, loss_state = judge(updates, state, params, loss, passed)
        anew = over & finite & (state.consecutive_skips >= most)
        skip = ~finite | (over & ~anew)
        fresh, fresh_loss = thresholds(updates if params is None else params)
        steps, new = inner.update(updates, state.inner, params, **passed)
        return jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), steps), SkipState(
            jnp.where(skip, optax.safe_increment(state.skipped_steps), state.skipped_steps),
            jnp.where(skip, optax.safe_increment(state.consecutive_skips), 0),
            spike._replace(threshold=_select(anew, fresh.threshold, spike.threshold)),
            _select(anew, fresh_loss, loss_state),
            _select(skip, state.inner, new),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _leave_alone(norms, bounds):
    return jnp.ones_like(norms)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees. A select, not a `cond`: it fuses, takes vmap, and asks nothing of the types in `shard_map`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def skip_nonfinite(
    inner: optax.GradientTransformation, *, exclude: Exclude = None, axis_names: AxisNames | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients are not finite: updates of zero, and `inner` untouched, for as long as it takes.

    Unlike `optax.apply_if_finite`, which applies a NaN after some number of them; `consecutive_skips` in the state
    tells a loop when to give up. If `update` is passed `loss=`, it must be finite, too.

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
    inner = as_optimizer(inner, "skip_nonfinite")
    watch = clip_by(jnp.inf, action=_leave_alone, exclude=exclude, axis_names=axis_names)
    return _skipping(inner, watch, unchanging(jnp.inf), 1)
