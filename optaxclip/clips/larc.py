"""LARC: the rate of each layer is limited to a share of the layer's own size."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, validate, xla
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.core import clip_by
from optaxclip.engine import chain
from optaxclip.thresholds.blocks import new_threshold
from optaxclip.thresholds.convert import as_threshold


@validate.named
def larc(
    learning_rate: Threshold,
    trust_coefficient: ArrayLike = 0.02,
    weight_decay: float | jax.Array = 0.0,
    eps: ArrayLike = 1e-8,
    *,
    mask: Any = None,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each layer's own rate to the global one.

    g ← (g + λw) · min(1, t·‖w‖ / ((‖g‖ + λ‖w‖ + ε) · η)). This is LARS in its clipping form. Place
    it before SGD with the same learning rate η. `update` needs `params`.

    Args:
      learning_rate: η, a number or a schedule: that of the optimizer that follows.
      trust_coefficient: t, the longest step as a share of the layer's norm.
      weight_decay: λ, added to the gradient here; do not let the optimizer add decay as well.
      eps: ε.
      mask: which leaves decay, as in `optax.add_decayed_weights`; None: all. The others are clipped
        with a λ of 0 by a separate clip, like apex's groups without decay.
      scope: which numbers share one norm; the paper's is `scopes.leaf`. With a mask, leaves that
        decay share no norm with leaves that do not.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range; at the update, if `params` is missing.

    Deviations: as in apex, a layer whose parameters or gradients are all zero is not clipped, but
    here its weights still decay.

    References:
      You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks
      <https://arxiv.org/abs/1708.03888>`_, 2017, and LARC in NVIDIA's apex

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.larc(0.1)
    >>> params = jnp.array([1.0])
    >>> updates, _ = tx.update(jnp.array([9.0]), tx.init(params), params)
    >>> round(float(updates[0]), 4)  # 0.1 · 0.2 is 2 % of 1
    0.2
    """
    validate.nonnegative(trust_coefficient=trust_coefficient, weight_decay=weight_decay, eps=eps)
    rate = as_threshold(learning_rate=learning_rate)

    def decayed(decay):
        clip = clip_by(
            _share_of_params(rate, trust_coefficient, decay, eps),
            scope=scope,
            # Measures the gradient alone, as it was before the decay.
            view=lambda update, param: update - xla.like(decay, param.real) * param,
            exclude=exclude,
            nonfinite=nonfinite,
            axis_names=axis_names,
        )
        # Decay comes first, as in apex: the factor shortens gradient and decay together.
        return chain(optax.add_decayed_weights(decay), clip)

    if mask is None:
        return decayed(weight_decay)
    return chain(
        optax.masked(decayed(weight_decay), mask), optax.masked(decayed(0.0), _invert(mask))
    )


def _share_of_params(
    rate: optax.GradientTransformationExtraArgs,
    trust_coefficient: ArrayLike,
    weight_decay: ArrayLike,
    eps: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The bound that makes `rescale` multiply by t·‖w‖ / ((‖g‖ + λ‖w‖ + ε) · η)."""

    def bound(norm, size, rate):
        trust, decay, least = (xla.like(x, norm) for x in (trust_coefficient, weight_decay, eps))
        whole = (norm + decay * size + least) * rate
        # As in apex, except that there such a layer also misses its weight decay.
        free = (size == 0) | (norm == 0) | (whole == 0)
        return jnp.where(free, math.inf, norm * (trust * size / jnp.where(free, 1, whole)))

    def update_fn(norms, state, params=None, **extra_args):
        rates, state = rate.update(norms, state, params, **extra_args)
        return jax.tree.map(bound, norms, params, rates), state

    # Not `NormsOnly`, which would not be given the norms of the parameters.
    return new_threshold(rate.init, update_fn, kind=optax.GradientTransformationExtraArgs)


def _invert(mask: Any) -> Any:
    """Inverts a mask, or a function that returns one."""
    if callable(mask):
        return lambda params: _invert(mask(params))
    return jax.tree.map(lambda shown: not shown, mask)
