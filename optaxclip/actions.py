"""What happens to a block: `(norms, bounds) -> factors`, which blocks are multiplied by.

Each action decides how long the block is to be, then divides. A block that already has that length
gets a factor of exactly 1 and comes back bit for bit. Actions are homogeneous: a factor depends
only on the ratio of norm and bound.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import Action, Part


def _action(rule) -> Part:
    return Part(f"actions.{rule.__name__}", rule)


def _factor(lengths, norms):
    """`lengths / norms`; exactly 1 where nothing changes, and for blocks of zeros.

    The division never sees a zero, not even where its result is not selected: `0 / 0` there would
    make derivatives NaN.
    """
    # `n / n` would be 1 as well, but its derivative, 1/n - n/n², is only approximately 0.
    same = (lengths == norms) | (norms == 0)
    return jnp.where(same, 1, lengths / jnp.where(same, 1, norms))


def _are_free(bounds):
    """Where there is no bound."""
    # Not `isinf`: op by op it makes an infinity, which `jax.debug_infs` takes for an overflow.
    return bounds > jnp.finfo(bounds.dtype).max


@_action
def rescale(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Shortens a block that is too long to its bound: min(1, b / n).

    >>> from optaxclip import actions
    >>> actions.rescale(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([1. , 0.5], dtype=float32)
    """
    # Not `_factor` of the smaller one, which is three more kernels on a TPU.
    same = norms <= bounds
    return jnp.where(same, 1, bounds / jnp.where(same, 1, norms))


@_action
def normalize(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Gives every block the length of its bound: b / n. Zeros stay zeros.

    No bound (infinity) means no change.

    >>> from optaxclip import actions
    >>> actions.normalize(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([2. , 0.5], dtype=float32)
    """
    return _factor(jnp.where(_are_free(bounds), norms, bounds), norms)


@_action
def zero(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Drops a block that is too long: 0 if n > b, else 1.

    Note that an optimizer after the clip still steps: momentum moves the parameters, and moments
    decay. To leave the whole step out, use `optaxclip.skip_spikes`.

    >>> from optaxclip import actions
    >>> actions.zero(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([1., 0.], dtype=float32)
    """
    return jnp.where(norms > bounds, 0, jnp.ones_like(norms))


@_action
def keep(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Leaves blocks as they are, for a clip that only measures."""
    return jnp.ones_like(norms)


@validate.makes_part
@validate.named
def smooth(p: ArrayLike = 2.0) -> Action:
    """Shortens every block to at most b, without a kink: (1 + (n / b)ᵖ)^(-1/p).

    At n = b the factor is 2^(-1/p): 0.5 for p = 1, 0.71 for 2, 0.92 for 8. p = inf is `rescale`.

    Raises:
      ValueError: if p < 1.

    >>> from optaxclip import actions
    >>> actions.smooth(1.0)(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
    Array([0.5 , 0.25], dtype=float32)
    """
    validate.at_least(1, p=p)
    # The formula below has the right limit, but its derivative is NaN.
    if not isinstance(p, jax.Array) and p == math.inf:
        return rescale

    def rule(norms, bounds):
        # The smaller over the larger, so that no power overflows and b = 0, b = inf and n = 0 need
        # no special case.
        over = norms > bounds
        ratio = _factor(jnp.where(over, bounds, norms), jnp.where(over, norms, bounds))
        ratio = jnp.where((norms == 0) | _are_free(bounds), 0, ratio)
        # Cast, because p may be a NumPy float64 or a tracer in the dtype of the parameters.
        power = xla.like(p, ratio)
        shrink = (1 + ratio**power) ** (-1 / power)
        return jnp.where(over, ratio, 1) * shrink

    return Part(f"actions.smooth({p})", rule)


@validate.makes_part
@validate.named
def band(low: ArrayLike = 0.0, *, floor: ArrayLike = 0.0) -> Action:
    """Keeps a block's length between a floor and its bound: clip(n, max(low · b, floor), b) / n.

    The floor raises vanishing gradients as the bound limits exploding ones. Zeros stay zeros. If
    the floor is above the bound, the bound wins.

    Args:
      low: the floor as a share of the bound, from 0 to 1.
      floor: the floor as a length.

    Raises:
      ValueError: if `low` is outside [0, 1], or `floor` is negative.

    >>> from optaxclip import actions
    >>> actions.band(0.5)(jnp.array([0.1, 0.8, 2.0]), jnp.array([1.0, 1.0, 1.0]))
    Array([5. , 1. , 0.5], dtype=float32)
    """
    validate.between(0, 1, low=low)
    validate.nonnegative(floor=floor)

    def rule(norms, bounds):
        # Without a bound there is no relative floor: 0 · inf would be NaN.
        relative = xla.like(low, norms) * jnp.where(_are_free(bounds), 0, bounds)
        lowest = jnp.minimum(jnp.maximum(relative, xla.like(floor, norms)), bounds)
        return _factor(jnp.clip(norms, lowest, bounds), norms)

    given = f"{low}" if isinstance(floor, float) and floor == 0 else f"{low}, floor={floor}"
    return Part(f"actions.band({given})", rule)


def as_action(action: Action | None) -> Action:
    """The action; `rescale` for None.

    Raises:
      ValueError: naming the call and the choices, if it is not a function, or if it is `smooth` or
        `band` without parentheses.
    """
    if action is None:
        return rescale
    if not (validate.is_function(action) or validate.is_part(action, "actions", "per_example")):
        choices = (
            "actions.rescale, actions.normalize, actions.zero, actions.smooth(p), actions.band(low)"
        )
        raise validate.fail(
            f"action must be {choices} or a function (norms, bounds) -> factors", action
        )
    return action


__all__ = ["band", "keep", "normalize", "rescale", "smooth", "zero"]
