"""Dynamic loss scaling for float16 training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import validate
from optaxclip.base import AxisNames
from optaxclip.engine import Description, guarded
from optaxclip.wrappers.skip import skip_nonfinite
from optaxclip.wrappers.steps import SkipState, multiply


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      loss_scale: float32, the factor by which the next loss must be multiplied.
      finite_steps: int32, the steps taken since the scale last changed.
      inner: the state of `skip_nonfinite(inner)`.
    """

    loss_scale: jax.Array
    finite_steps: jax.Array
    inner: SkipState


@validate.named
def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    initial_scale: float = 2.0**15,
    *,
    factor: float = 2.0,
    growth_interval: int = 2000,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale, skips steps that overflowed, and adjusts the scale.

    float16 gradients below 6e-8 become zero, but those of S times the loss do not. So multiply the
    loss by `state.loss_scale`, and wrap the whole optimizer, clip included: it then sees g / S.

        S ← max(S / factor, min_scale)   after a step whose gradient is not finite, which is skipped
        S ← min(S · factor, max_scale)   after `growth_interval` steps in a row that were taken

    A gradient that is not finite at any scale (a NaN in the data) is skipped as well, and lowers S
    down to `min_scale`; `optaxclip.metrics` reports `loss_scale` and `skip/consecutive`.

    Args:
      inner: the optimizer, or a chain with a clip in it.
      initial_scale: S at the first step.
      factor: the factor by which S grows and shrinks. With a power of two, no digit of a gradient
        changes.
      growth_interval: the number of steps in a row after which S grows.
      min_scale, max_scale: the limits of S.
      axis_names: as in `optaxclip.clip_by`, for the test whether all gradients are finite.

    Returns:
      A transformation whose updates have the dtype of the gradients. Keep the parameters in float32
      and cast them to float16 inside the loss: then the gradients are float32, and g / S is not
      rounded to zero again.

    Raises:
      ValueError: for an `inner` that is not an optimizer, a scale that is not above 0, a `factor`
        of at most 1, or an interval that is not a whole number of at least 1.

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018

    >>> import jax, jax.numpy as jnp, optax, optaxclip
    >>> from optaxclip.wrappers import dynamic_loss_scale
    >>> optimizer = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.5))
    >>> tx = dynamic_loss_scale(optimizer)
    >>> w = jnp.array(2.0)
    >>> state = tx.init(w)
    >>> for _ in range(3):  # 4 · 2^15 and 4 · 2^14 overflow float16
    ...     scale = state.loss_scale.astype("float16")
    ...     grads = jax.grad(lambda w: jnp.float16(w) ** 2 * scale)(w)
    ...     updates, state = tx.update(grads, state, w)
    ...     print(float(updates), float(state.loss_scale))
    0.0 16384.0
    0.0 8192.0
    -0.5 8192.0
    """
    validate.positive(initial_scale=initial_scale, min_scale=min_scale, max_scale=max_scale)
    validate.above(1, factor=factor)
    validate.steps(1, growth_interval=growth_interval)
    skipping: Any = skip_nonfinite(inner, axis_names=axis_names)

    def init_fn(params):
        start = jnp.array(initial_scale, jnp.float32)
        return LossScaleState(start, jnp.zeros((), jnp.int32), skipping.init(params))

    def update_fn(updates, state, params, **extra_args):
        unscaled = multiply(updates, 1 / state.loss_scale)
        steps, new = skipping.update(unscaled, state.inner, params, **extra_args)
        taken = new.consecutive_skips == 0
        count = jnp.where(taken, state.finite_steps + 1, 0)
        due = count >= growth_interval
        grown = jnp.where(due, state.loss_scale * factor, state.loss_scale)
        scale = jnp.where(taken, grown, state.loss_scale / factor)
        scale = jnp.clip(scale, min_scale, max_scale)
        return steps, LossScaleState(scale, jnp.where(due, 0, count), new)

    about = Description(kind="other", inner=skipping)
    return guarded(LossScaleState, init_fn, update_fn, about)
