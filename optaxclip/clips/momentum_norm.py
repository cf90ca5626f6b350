"""Clipping to a multiple of the norm of the momentum, leaf by leaf."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate, xla
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope
from optaxclip.clips.carry import can_learn, start_carry
from optaxclip.core import clip_by
from optaxclip.engine import description_of, guarded
from optaxclip.thresholds.running import weight_so_far
from optaxclip.trees import select


class MomentumNormState(NamedTuple):
    """State of `clip_by_momentum_norm`.

    Attributes:
      clip_step: int32, how many updates the momentum learned from.
      momentum: the running mean of clipped gradients, not bias-corrected, in float32 at least.
      clip: the `ClipState` of the clip.
    """

    clip_step: jax.Array
    momentum: Any
    clip: Any


@validate.named
def clip_by_momentum_norm(
    ratio: ArrayLike = 10.0,
    decay: ArrayLike = 0.9,
    *,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to a multiple of its momentum's norm: g ← g · min(1, r·‖m̂‖ / ‖g‖).

    m̂ is the running mean of clipped gradients. Unlike a mean of norms, m̂ is short if gradients
    point in all directions. There is no bound until there is momentum.

    Args:
      ratio: r. Gradients that are pure noise are √((1 + β) / (1 - β)) times as long as their mean
        of decay β, 4.4 times for 0.9. With a smaller ratio, clip and momentum would shrink each
        other to nothing.
      decay: β, the decay of the momentum.
      scope: which numbers share one norm; OLMo's is `scopes.leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a decay outside [0, 1), or a ratio below √((1 + β) / (1 - β)).

    Deviations: the momentum is the clip's own (an Optax transformation does not see Adam's), and
    bias-corrected (otherwise the second gradient is clipped to a tenth of the first). A gradient
    that is all zeros or not finite leaves it unchanged. No 1e-6 is added to the norm.

    References:
      An early version of `max_grad_norm_ratio` in the code of `OLMo
      <https://github.com/allenai/OLMo>`_, 2024; the later one is `thresholds.norm_ratio`

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_momentum_norm(5.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 4)
    5.0
    """
    validate.share(decay=decay)
    # For independent noise ‖m̂‖² is (1 - β) / (1 + β) of ‖g‖²: the sum of the squared weights.
    noise = math.sqrt((1 + decay) / (1 - decay)) if validate.is_static(decay) else 1
    validate.at_least(noise, ratio=ratio)
    # `param_relative` bounds a block by the norm of whatever tree it gets as `params`. Here
    # `update_fn` passes it the momentum instead.
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    clip = clip_by(thresholds.param_relative(ratio, floor=None), scope=scope, **shared)

    def init_fn(params):
        momentum = start_carry(params, exclude)
        return MomentumNormState(jnp.zeros((), jnp.int32), momentum, clip.init(params))

    def update_fn(updates, state, params, **extra_args):
        old = select(state.momentum, exclude)
        rest = jnp.asarray(1 - decay).astype(jnp.float32)
        # Corrected for the bound only: the next gradient goes into the momentum as it is stored.
        steps = jnp.maximum(state.clip_step, 1).astype(rest.dtype)
        scale = 1 / weight_so_far(rest, steps)
        momentum = old.rebuild([xla.times(m, scale) for m in old.arrays])
        clipped, clip_state = clip.update(updates, state.clip, momentum, **extra_args)
        # Zeros would pull the momentum, and with it every later bound, to zero forever.
        fine = can_learn(clip_state, zeros=False)
        new = _move(old.arrays, select(clipped, exclude).arrays, rest, fine)
        step = jnp.where(fine, optax.safe_increment(state.clip_step), state.clip_step)
        return clipped, MomentumNormState(step, old.rebuild(new), clip_state)

    about = description_of(clip)._replace(kind="other")
    return guarded(MomentumNormState, init_fn, update_fn, about)


def _move(momentum: list, gradients: list, rest: jax.Array, fine: jax.Array) -> list:
    """Updates the momentum with one more gradient, if it is fine."""
    pairs = zip(gradients, momentum, strict=True)
    return [jnp.where(fine, m + xla.times(xla.widen(g) - m, rest), m) for g, m in pairs]
