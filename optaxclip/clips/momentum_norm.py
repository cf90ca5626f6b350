"""Clipping to a multiple of the norm of the momentum, leaf by leaf."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import Nonfinite
from optaxclip.core import ClipState, clip_by
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.mesh import AxisNames
from optaxclip.norms import times, widen
from optaxclip.scopes import Scope, leaf
from optaxclip.thresholds.fixed import param_relative
from optaxclip.thresholds.learned import number


class MomentumNormState(NamedTuple):
    """State of `clip_by_momentum_norm`.

    Attributes:
      clip_step: int32, the updates that the momentum learned from.
      momentum: the running mean of clipped gradients, not bias-corrected, in float32 at least.
      clip: the `ClipState` of the clip.
    """

    clip_step: jax.Array
    momentum: Any
    clip: Any


def clip_by_momentum_norm(
    ratio: ArrayLike = 10.0,
    decay: ArrayLike = 0.9,
    *,
    scope: Scope = leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to a multiple of its momentum's norm: g ← g · min(1, r·‖m̂‖ / ‖g‖), m̂ the mean of clipped g.

    Unlike a mean of norms, m̂ is short where gradients point in all directions. No bound until there is momentum.

    Args:
      ratio: r. Gradients that are all noise are √((1 + β) / (1 - β)) times as long as their mean of decay β, 4.4 times
        for 0.9: with a smaller ratio clip and momentum would shrink each other to nothing.
      decay: of the momentum.
      scope: which numbers share one norm; OLMo's is `leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a decay outside [0, 1), or a ratio below √((1 + β) / (1 - β)).

    Deviations: the momentum is the clip's own (an Optax transformation does not see Adam's), and bias-corrected (else
    the second gradient is held to a tenth of the first). A gradient of zeros, or one that is not finite, leaves it as
    it is. No 1e-6 is added to the norm.

    References:
      `max_grad_norm_ratio` in the code of `OLMo <https://github.com/allenai/OLMo>`_, 2024

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_momentum_norm(5.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 4)
    5.0
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    decay = number(decay, "clip_by_momentum_norm", "decay", 0.0, 1.0)
    noise = math.sqrt((1 + decay) / (1 - decay)) if isinstance(decay, float | int) else 1.0
    ratio = number(ratio, "clip_by_momentum_norm", "ratio", noise)
    clip = clip_by(param_relative(ratio, floor=None), scope=scope, **shared)

    def init_fn(params):
        zeros = measured_leaves(jax.tree.map(jnp.zeros_like, params), exclude)
        momentum = zeros.rebuild([widen(x) for x in zeros.arrays])
        return MomentumNormState(jnp.zeros((), jnp.int32), momentum, clip.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        kept = measured_leaves(state.momentum, exclude)
        rest = jnp.asarray(1 - decay).astype(jnp.float32)
        seen = -jnp.expm1(jnp.maximum(state.clip_step, 1).astype(jnp.float32) * jnp.log1p(-rest))
        corrected = kept.rebuild([times(m, 1 / seen) for m in kept.arrays])
        clipped, clip_state = clip.update(updates, state.clip, corrected, **extra_args)
        gradients = [widen(g) for g in measured_leaves(clipped, exclude).arrays]
        norms = cast(ClipState, clip_state).metrics.grad_norm  # the same on all devices; gradients may be parts
        fine = jnp.all(jnp.isfinite(norms)) & jnp.any(norms > 0)
        moved = [jnp.where(fine, m + times(g - m, rest), m) for g, m in zip(gradients, kept.arrays, strict=True)]
        step = jnp.where(fine, optax.safe_increment(state.clip_step), state.clip_step)
        return clipped, MomentumNormState(step, kept.rebuild(moved), clip_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
