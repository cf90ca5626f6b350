"""StableAdamW: the step of each leaf is shortened where Adam's second moment lags behind the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.core import clip_by
from optaxclip.given import as_optimizer
from optaxclip.norms import rms, widen
from optaxclip.scopes import leaf
from optaxclip.thresholds.learned import number


class StableRmsState(NamedTuple):
    """State of `scale_by_stable_rms`: that of the optimizer inside, and the `ClipState` of what was shortened."""

    inner: optax.OptState
    clip: Any


def scale_by_stable_rms(
    inner: optax.GradientTransformation, b2: ArrayLike = 0.99, eps: ArrayLike = 1e-6
) -> optax.GradientTransformationExtraArgs:
    """Shortens each leaf of Adam's update: u ← u / max(1, RMS), RMS = √mean(g² / max(v̂, ε²)).

    RMS is over 1 where gradients have grown faster than v̂, their running mean square: the cause of many loss spikes.

    Args:
      inner: a transformation with Adam's second moment in its state, as `nu` beside `count`: `optax.scale_by_adam()`,
        also in a chain with weight decay, which is then shortened, too.
      b2: the decay of that moment.
      eps: ε.

    Raises:
      ValueError: for an `inner` that is no optimizer, a b2 outside [0, 1) or a negative eps; at the update, if the
        state has no `nu` and `count`.

    References:
      Wortsman et al., `Stable and low-precision training for large-scale vision-language models
      <https://arxiv.org/abs/2304.13013>`_, 2023

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optaxclip.scale_by_stable_rms(optax.scale_by_adam(b1=0.0, b2=0.5), b2=0.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 1e3):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 4)  # without: 1.2247
    1.0
    """
    b2, eps = number(b2, "scale_by_stable_rms", "b2", 0.0, 1.0), number(eps, "scale_by_stable_rms", "eps", 0.0)
    inner = as_optimizer(inner, "scale_by_stable_rms")
    clip = clip_by(1.0, scope=leaf, norm=rms, view=lambda update, share: share)

    def shares(updates: Any, state: optax.OptState) -> Any:
        moments, step = optax.tree.get(state, "nu"), optax.tree.get(state, "count")
        if moments is None or step is None:
            raise ValueError(
                "scale_by_stable_rms: inner must keep Adam's `nu` and `count`: wrap optax.scale_by_adam()."
            )
        log = jnp.log1p(-jnp.asarray(1 - b2).astype(jnp.float32))
        seen = -jnp.expm1(step.astype(jnp.float32) * log)

        def share(g, v):
            lowest = jnp.asarray(eps).astype(widen(v).dtype)
            return jnp.abs(widen(g)) / jnp.maximum(jnp.sqrt(widen(v) / seen.astype(widen(v).dtype)), lowest)

        return jax.tree.map(share, updates, moments)

    def init_fn(params):
        return StableRmsState(inner.init(params), clip.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        steps, new = inner.update(updates, state.inner, params, **extra_args)
        clipped, record = clip.update(steps, state.clip, shares(updates, new))
        return clipped, StableRmsState(new, record)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW, the rate of each leaf divided by max(1, RMS(g / √v̂)): Adafactor's update clipping for Adam.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask: of `optax.adamw`. Weight decay is shortened like the rest.

    References:
      Wortsman et al., `Stable and low-precision training for large-scale vision-language models
      <https://arxiv.org/abs/2304.13013>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.stable_adamw(0.1)
    >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    >>> round(float(updates[0]), 4)
    -0.1
    """
    adamw = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(scale_by_stable_rms(adamw, b2, eps), optax.scale_by_learning_rate(learning_rate))
