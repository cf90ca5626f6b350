"""What a statistic learns of norms: `(norms, bounds) -> norms`.

Infinity and NaN mean "nothing".
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from optaxclip.base import Part


# A feed says infinity, and not "skip": it is one vector operation for all blocks, of which some
# learn.
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
    # Not `norms > bounds` the other way round: NaN is over no bound, and would pass. Not NaN for
    # "nothing", which `jax.debug_nans` takes for a fault.
    return jnp.where(norms <= bounds, norms, math.inf)


__all__ = ["accepted", "clipped", "raw"]
