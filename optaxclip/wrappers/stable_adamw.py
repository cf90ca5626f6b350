"""StableAdamW: shortens the step of a leaf if Adam's second moment lags behind the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, validate, xla
from optaxclip.base import AxisNames
from optaxclip.core import clip_by
from optaxclip.engine import chain, description_of, guarded
from optaxclip.norms import rms
from optaxclip.states import explain_leaves, init_inside
from optaxclip.thresholds.running import weight_so_far


class StableRmsState(NamedTuple):
    """State of `scale_by_stable_rms`: that of the optimizer inside, and a `ClipState`."""

    inner: optax.OptState
    clip: Any


@validate.named
def scale_by_stable_rms(
    inner: optax.GradientTransformation,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-6,
    *,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens each leaf of Adam's update: u ← u / max(1, RMS), RMS = √mean(g² / max(v̂, ε²)).

    RMS is over 1 if gradients have grown faster than v̂, their running mean square, which causes
    many loss spikes.

    Args:
      inner: a transformation whose state has Adam's second moment as `nu`, and `count`:
        `optax.scale_by_adam()`, also in a chain with weight decay, which is then shortened, too.
      b2: the decay of that moment.
      eps: ε.
      axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for an `inner` that is not an optimizer, a b2 outside [0, 1) or a negative eps; at
        the update, if the state has no `nu` and `count`.

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
    validate.share(b2=b2)
    validate.nonnegative(eps=eps)
    inner = validate.as_optimizer(inner)
    call = validate.called()
    # Measures g / √v̂ instead of the step; `update_fn` passes it as `params`.
    clip = clip_by(
        1.0, scope=scopes.leaf, norm=rms, view=lambda step, share: share, axis_names=axis_names
    )

    def init_fn(params):
        return StableRmsState(init_inside(call, inner, params), clip.init(params))

    def update_fn(updates, state, params, **extra_args):
        # Adam first, because its second moment must include this gradient. At the first step the
        # previous one is zero, compared with which every gradient is a spike.
        with explain_leaves(call, updates):
            steps, new = inner.update(updates, state.inner, params, **extra_args)
        clipped, record = clip.update(steps, state.clip, _shares(call, updates, new, b2, eps))
        return clipped, StableRmsState(new, record)

    about = description_of(clip)._replace(inner=inner)
    return guarded(StableRmsState, init_fn, update_fn, about)


def _shares(call: str, updates: Any, state: optax.OptState, b2: ArrayLike, eps: ArrayLike) -> Any:
    """Computes |g| / max(√v̂, ε) by element, with v̂ from Adam's state after the step."""
    moments, count = optax.tree.get(state, "nu"), optax.tree.get(state, "count")
    if moments is None or count is None:
        raise ValueError(
            f"{call}: inner must keep Adam's `nu` and `count`: wrap optax.scale_by_adam()."
        )
    # 1 - b2 is computed before rounding, as a float32 near 1 has only half the digits of it.
    rest = jnp.asarray(1 - b2).astype(jnp.float32)
    weight = weight_so_far(rest, count.astype(jnp.float32))

    # Moments of bfloat16 gradients are bfloat16, and a ratio in that dtype would have 8 bits.
    def share(g, v):
        corrected = xla.root(xla.widen(v) / xla.like(weight, xla.widen(v)))
        return jnp.abs(xla.widen(jnp.asarray(g))) / jnp.maximum(corrected, xla.like(eps, corrected))

    return jax.tree.map(share, updates, moments)


@validate.named
def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with the rate of each leaf divided by max(1, RMS(g / √v̂)).

    This is Adafactor's update clipping for Adam.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask: as in `optax.adamw`. Weight decay is
        shortened like the rest.
      axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a b2 outside [0, 1) or a negative eps.

    Derivatives of updates (for meta-learning) are NaN at elements that were always zero, where
    Optax's Adam takes the root of v = 0.

    References:
      Wortsman et al., `Stable and low-precision training for large-scale vision-language models
      <https://arxiv.org/abs/2304.13013>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.stable_adamw(0.1)
    >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    >>> round(float(updates[0]), 4)
    -0.1
    """
    # Decay goes inside, because the rate of the whole leaf is lowered. The learning rate goes
    # outside: a schedule has its own `count`, and `optax.tree.get` refuses to choose between two.
    adamw = optax.chain(
        optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask)
    )
    return chain(
        scale_by_stable_rms(adamw, b2, eps, axis_names=axis_names),
        optax.scale_by_learning_rate(learning_rate),
    )
