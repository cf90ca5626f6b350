"""Clips that remember: what was cut off is carried over (U-Clip), or only the gradient's change is cut (Clip21)."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import Nonfinite, as_dtype_of
from optaxclip.core import ClipState, clip_by
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.mesh import AxisNames
from optaxclip.norms import widen
from optaxclip.scopes import Scope, tree
from optaxclip.thresholds.combine import Threshold, as_threshold
from optaxclip.thresholds.fixed import unchanging
from optaxclip.thresholds.learned import number


class CarryState(NamedTuple):
    """State of `u_clip` and `clip21`.

    Attributes:
      carry: what is kept of past gradients, a tree like the parameters, in float32 at least.
      clip: the `ClipState` of the clip.
    """

    carry: Any
    clip: Any


def _zeros(params: Any, exclude: Exclude) -> Any:
    leaves = measured_leaves(jax.tree.map(jnp.zeros_like, params), exclude)
    return leaves.rebuild([widen(x) for x in leaves.arrays])


def _all_finite(state: optax.OptState) -> jax.Array:
    """Whether what a clip measured was finite: one decision for all devices, as the norm is."""
    return jnp.all(jnp.isfinite(cast(ClipState, state).metrics.grad_norm))


def _kept(fine: jax.Array, new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(fine, a, b) for a, b in zip(new, old, strict=True)]


def u_clip(
    max_norm: Threshold,
    max_carry: ArrayLike = 10.0,
    *,
    scope: Scope = tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient plus what was cut off before: u = clip(g + Δ), Δ ← g + Δ - u. On average nothing is lost.

    Args:
      max_norm: the bound γ. It must be larger than the mean gradient's norm, or Δ grows until it is capped.
      max_carry: the cap on ‖Δ‖, as a multiple of the bound.
      scope: which numbers share one norm; `units(())` clips each element by itself.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bad bound, or a negative cap.

    Deviations: the cap; a gradient that is not finite leaves Δ as it is.

    References:
      Elesedy and Hutter, `U-Clip: On-Average Unbiased Stochastic Gradient Clipping <https://arxiv.org/abs/2302.02971>`_,
      2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.u_clip(1.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (2.5, 0.0, 0.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print(updates)
    [1.]
    [1.]
    [0.5]
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    max_carry = number(max_carry, "u_clip", "max_carry", 0.0)
    clip = clip_by(as_threshold(max_norm, "u_clip", "max_norm"), scope=scope, **shared)

    def capped(carry: Any, bound: jax.Array) -> Any:
        cap = clip_by(unchanging(jnp.asarray(max_carry).astype(bound.dtype) * bound), scope=scope, **shared)
        return cap.update(carry, cap.init(carry))[0]

    def update_fn(updates, state, params=None, **extra_args):
        leaves, old = measured_leaves(updates, exclude), measured_leaves(state.carry, exclude)
        sums = [widen(g) + c for g, c in zip(leaves.arrays, old.arrays, strict=True)]
        clipped, clip_state = clip.update(leaves.rebuild(sums), state.clip, params, **extra_args)
        kept = measured_leaves(clipped, exclude).arrays
        rest = old.rebuild([a - b for a, b in zip(sums, kept, strict=True)])
        carry = measured_leaves(capped(rest, cast(ClipState, clip_state).metrics.clip_bound), exclude).arrays
        carry = old.rebuild(_kept(_all_finite(clip_state), carry, old.arrays))
        return leaves.rebuild(list(map(as_dtype_of, leaves.arrays, kept))), CarryState(carry, clip_state)

    return optax.GradientTransformationExtraArgs(
        lambda params: CarryState(_zeros(params, exclude), clip.init(params)), update_fn
    )


def clip21(
    max_norm: Threshold,
    *,
    scope: Scope = tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the change of the gradient: v ← v + clip(g - v), and the update is v, which starts at zero.

    Where gradients settle, v settles on them, whatever the bound: clipping does not shift where training converges.

    Args:
      max_norm: the bound of the change.
      scope: which numbers share one norm; `units(())` clips each element by itself.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bad bound.

    Deviations: the paper has many workers, each with a v of its own; this is one of them. A gradient that is not finite
    leaves v as it is.

    References:
      Khirirat et al., `Clip21: Error Feedback for Gradient Clipping <https://arxiv.org/abs/2305.18929>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip21(1.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.array([2.5]), state)
    ...     print(updates)
    [1.]
    [2.]
    [2.5]
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    clip = clip_by(as_threshold(max_norm, "clip21", "max_norm"), scope=scope, **shared)

    def update_fn(updates, state, params=None, **extra_args):
        leaves, old = measured_leaves(updates, exclude), measured_leaves(state.carry, exclude)
        change = [widen(g) - v for g, v in zip(leaves.arrays, old.arrays, strict=True)]
        clipped, clip_state = clip.update(leaves.rebuild(change), state.clip, params, **extra_args)
        cut, fine = measured_leaves(clipped, exclude).arrays, _all_finite(clip_state)
        moved = [v + c for v, c in zip(old.arrays, cut, strict=True)]
        carry, out = _kept(fine, moved, old.arrays), _kept(fine, moved, cut)
        return leaves.rebuild(list(map(as_dtype_of, leaves.arrays, out))), CarryState(old.rebuild(carry), clip_state)

    return optax.GradientTransformationExtraArgs(
        lambda params: CarryState(_zeros(params, exclude), clip.init(params)), update_fn
    )
