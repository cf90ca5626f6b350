"""Clips that carry over what was cut off (U-Clip), or clip only the gradient's change (Clip21)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, validate, xla
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope, Threshold
from optaxclip.clips.carry import can_learn, start_carry
from optaxclip.core import clip_by
from optaxclip.engine import description_of, guarded
from optaxclip.thresholds.blocks import Fixed, new_threshold
from optaxclip.thresholds.convert import as_threshold
from optaxclip.trees import Leaves, select


class CarryState(NamedTuple):
    """State of `u_clip` and `clip21`.

    Attributes:
      carry: the kept part of past gradients, a tree like the parameters, in float32 at least.
      clip: the `ClipState` of the clip.
    """

    carry: Any
    clip: Any


def _remember(clip, exclude: Exclude, step) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from one `step(leaves, carry, state, params, **extra_args)`.

    The step returns the updates and the carry, as lists of arrays, and the new state of the clip.
    """

    def init_fn(params):
        return CarryState(start_carry(params, exclude), clip.init(params))

    def update_fn(updates, state, params, **extra_args):
        leaves, old = select(updates, exclude), select(state.carry, exclude)
        out, carry, clip_state = step(leaves, old.arrays, state.clip, params, **extra_args)
        fine = can_learn(clip_state)
        # One NaN in the carry would stay there forever, because the carry is added to every later
        # gradient.
        kept = [jnp.where(fine, a, b) for a, b in zip(carry, old.arrays, strict=True)]
        out = list(map(xla.as_dtype_of, leaves.arrays, out))
        return leaves.rebuild(out), CarryState(old.rebuild(kept), clip_state)

    # Its update is not a rescaled gradient, so `check` must not reason about its length.
    about = description_of(clip)._replace(kind="other")
    return guarded(CarryState, init_fn, update_fn, about)


def _clip(clip, leaves: Leaves, arrays: list[jax.Array], exclude: Exclude, *rest, **extra_args):
    """Clips arrays that replace the leaves; returns the clipped arrays and the new state."""
    tree, state = clip.update(leaves.rebuild(arrays), *rest, **extra_args)
    return select(tree, exclude).arrays, state


@validate.named
def u_clip(
    max_norm: Threshold,
    max_carry: ArrayLike = 10.0,
    *,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient plus what was cut off before: u = clip(g + Δ), Δ ← g + Δ - u.

    On average nothing is lost.

    Args:
      max_norm: the bound γ. It must be larger than the mean gradient's norm, or Δ grows until it is
        capped.
      max_carry: the cap on ‖Δ‖, as a multiple of the bound.
      scope: which numbers share one norm; `scopes.units(())` clips each element by itself.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bad bound, or a negative cap.

    Deviations: the cap; a gradient that is not finite leaves Δ unchanged.

    References:
      Elesedy and Hutter, `U-Clip: On-Average Unbiased Stochastic Gradient Clipping
      <https://arxiv.org/abs/2302.02971>`_, 2023

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
    validate.nonnegative(max_carry=max_carry)
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    clip = clip_by(as_threshold(max_norm=max_norm), scope=scope, **shared)

    def limit(norms, state, params=None, *, carry_bound, **extra_args):
        return jax.tree.map(lambda bound: xla.like(max_carry, bound) * bound, carry_bound), state

    # Built once, and given the bound at each update: a new clip would compile at each update.
    limits = new_threshold(lambda norms: optax.EmptyState(), limit, kind=Fixed)
    cap = clip_by(limits, scope=scope, **shared)

    def step(leaves, carry, state, params, **extra_args):
        # In float32 at least: the carry exists to keep what is cut off, and bfloat16 would round
        # some of it away.
        sums = [xla.widen(g) + c for g, c in zip(leaves.arrays, carry, strict=True)]
        out, state = _clip(clip, leaves, sums, exclude, state, params, **extra_args)
        # From the same wide sums, so that update and carry add up to them.
        rest = [a - b for a, b in zip(sums, out, strict=True)]
        # The bound from this step: calling the threshold again would let it learn the norm twice.
        bound = state.metrics.clip_bound
        return out, _clip(cap, leaves, rest, exclude, None, carry_bound=bound)[0], state

    return _remember(clip, exclude, step)


@validate.named
def clip21(
    max_norm: Threshold,
    *,
    scope: Scope = scopes.tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the change of the gradient: v ← v + clip(g - v), from v = 0, and the update is v.

    If gradients settle, v settles on them, whatever the bound: clipping does not shift where
    training converges.

    Args:
      max_norm: the bound of the change.
      scope: which numbers share one norm; `scopes.units(())` clips each element by itself.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bad bound.

    Deviations: the paper has many workers, each with its own v; this is one of them. A gradient
    that is not finite leaves v unchanged.

    References:
      Khirirat et al., `Clip21: Error Feedback for Gradient Clipping
      <https://arxiv.org/abs/2305.18929>`_, 2023

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
    clip = clip_by(
        as_threshold(max_norm=max_norm),
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )

    def step(leaves, carry, state, params, **extra_args):
        change = [xla.widen(g) - v for g, v in zip(leaves.arrays, carry, strict=True)]
        cut, state = _clip(clip, leaves, change, exclude, state, params, **extra_args)
        moved = [v + c for v, c in zip(carry, cut, strict=True)]
        fine = can_learn(state)
        # If the gradient is bad, the update must show it (NaN or zeros) and not repeat v.
        out = [jnp.where(fine, new, bad) for new, bad in zip(moved, cut, strict=True)]
        return out, moved, state

    return _remember(clip, exclude, step)
