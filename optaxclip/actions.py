"""What is done about a block: (norms, bounds) -> factors, each the number that the block is multiplied by.

Each action first says how long the block shall be, then divides.  A block that already is that long gets a factor of
exactly 1 and comes back bit for bit.  An action is homogeneous: it depends on the ratio of norm and bound alone, so the
engine may hand it both in any unit.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip.given import known, said

Action = Callable[[jax.Array, jax.Array], jax.Array]


def _factor(lengths, norms):
    """`lengths / norms`; exactly 1 where nothing changes, and for blocks of zeros, which no factor can lengthen.

    The division never sees a zero, not even where its result is dropped: `0 / 0` there would poison derivatives.
    """
    same = (lengths == norms) | (norms == 0)
    return jnp.where(same, 1, lengths / jnp.where(same, 1, norms))


def rescale(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Shortens a block that is too long to its bound: min(1, b / n).

    >>> rescale(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([1. , 0.5], dtype=float32)
    """
    return _factor(jnp.minimum(norms, bounds), norms)


def normalize(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Gives every block the length of its bound: b / n. Zeros stay zeros; no bound (infinity), no change.

    >>> normalize(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([2. , 0.5], dtype=float32)
    """
    return _factor(jnp.where(jnp.isinf(bounds), norms, bounds), norms)


def zero(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Drops a block that is too long: 0 if n > b, else 1.

    Note that an optimizer after the clip still steps: momentum moves the parameters, and moments decay.

    >>> zero(jnp.array([0.5, 2.0]), jnp.array([1.0, 1.0]))
    Array([1., 0.], dtype=float32)
    """
    return jnp.where(norms > bounds, 0, jnp.ones_like(norms))


def _outside(value, low: float, high: float) -> bool:
    """Whether a number is outside [low, high]; tracers are not looked into."""
    value = known(value)
    return not isinstance(value, jax.Array) and not low <= value <= high


def smooth(p: jax.typing.ArrayLike = 2.0) -> Action:
    """Shortens every block, the more the longer it is: (1 + (n / b)ᵖ)^(-1/p), at most b in length, without a kink.

    At n = b the factor is 2^(-1/p): 0.5 for p = 1, 0.71 for 2, 0.92 for 8. p = inf is `rescale`.

    Raises:
      ValueError: if p < 1.

    >>> smooth(1.0)(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
    Array([0.5 , 0.25], dtype=float32)
    """
    if _outside(p, 1, math.inf):
        raise ValueError(f"smooth: p must be at least 1 (inf for the hard clip), got {p!r}.")
    if not isinstance(p, jax.Array) and p == math.inf:
        return rescale

    def action(norms, bounds):
        # The smaller over the larger: no power overflows, and b = 0, b = inf and n = 0 need no case of their own.
        over = norms > bounds
        ratio = _factor(jnp.where(over, bounds, norms), jnp.where(over, norms, bounds))
        ratio = jnp.where((norms == 0) | jnp.isinf(bounds), 0, ratio)
        power = jnp.asarray(p).astype(ratio.dtype)
        shrink = (1 + ratio**power) ** (-1 / power)
        return jnp.where(over, ratio, 1) * shrink

    return action


def band(low: jax.typing.ArrayLike = 0.0, *, floor: jax.typing.ArrayLike = 0.0) -> Action:
    """Keeps a block's length between a floor and its bound: clip(n, max(low · b, floor), b) / n.

    The floor lifts vanishing gradients as the bound holds exploding ones. Zeros stay zeros; where floor and bound
    contradict each other the bound wins.

    Args:
      low: the floor as a share of the bound, from 0 to 1.
      floor: the floor as a length.

    Raises:
      ValueError: if `low` is outside [0, 1].

    >>> band(0.5)(jnp.array([0.1, 0.8, 2.0]), jnp.array([1.0, 1.0, 1.0]))
    Array([5. , 1. , 0.5], dtype=float32)
    """
    if _outside(low, 0, 1):
        raise ValueError(f"band: low is a share of the bound, from 0 to 1, got {low!r}.")

    def action(norms, bounds):
        relative = jnp.asarray(low).astype(norms.dtype) * jnp.where(jnp.isinf(bounds), 0, bounds)
        lowest = jnp.minimum(jnp.maximum(relative, jnp.asarray(floor, norms.dtype)), bounds)
        return _factor(jnp.clip(norms, lowest, bounds), norms)

    return action


def as_action(action: Action | None, call: str) -> Action:
    """The action; `rescale` for None.

    Raises:
      ValueError: naming the call and what there is, for what is no function, and for `smooth` and `band` not called.
    """
    if action is None:
        return rescale
    if not callable(action) or action in (smooth, band):
        choices = "optaxclip.rescale, normalize, zero, smooth(p), band(low) or a function (norms, bounds) -> factors"
        raise ValueError(f"{call}: action must be {choices}, got {said(action, smooth, band)}.")
    return action
