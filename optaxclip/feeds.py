"""What a statistic learns from a norm: `(norms, bounds) -> norms`.

Infinity and NaN mean "nothing".
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from optaxclip.base import Part


# "Nothing" is a value, not a branch: a feed is one vector operation for all blocks, and some of
# them learn.
def _feed(rule):
    return Part(f"feeds.{rule.__name__}", rule)


@_feed
def raw(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """The norm as it is. A spike enters the statistic at its full size."""
    return norms


@_feed
def clipped(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """The norm after the clip. A spike counts as its bound, a lasting change is followed slowly."""
    return jnp.minimum(norms, bounds)


@_feed
def accepted(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Only norms within the bound. A lasting change is not learned: give it `relearn_after`."""
    # Not the negation of `norms > bounds`, which a NaN would pass. Infinity and not NaN for
    # "nothing", as `jax.debug_nans` would report a NaN.
    return jnp.where(norms <= bounds, norms, math.inf)


__all__ = ["accepted", "clipped", "raw"]
