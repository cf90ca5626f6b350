"""Scales at which powers neither overflow nor underflow, and the length from sums at several.

A scale is a power of two, so that nothing rounds.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.base import Norm


def scales_of(norm: Norm, dtype, units: bool) -> tuple[float, ...]:
    """The scales at which to pool, largest first; just 1 if no power can overflow or underflow.

    A pool is exact while |x| is within 2^±(126 / p). Scales are 2^(160 / p) apart, which overlaps
    by enough for a sum of a billion numbers.
    """
    if norm.pool == "max" or norm.power <= 1:
        return (1.0,)
    wide = jnp.finfo(dtype).maxexp / 128
    if units and norm.power == 2:
        # Two scales, as a third costs 4 bytes per parameter on a GPU. They reach from 1e-36 to
        # 1e36; where one takes over from the other, terms below 2^-25 of the sum are lost.
        return (2.0 ** (57 * wide), 2.0 ** (-57 * wide))
    step = 160 / norm.power
    count = math.ceil((120 - 126 / norm.power) / step)
    return tuple(2.0 ** round(step * wide * i) for i in range(count, -count - 1, -1))


def choose(norm: Norm, pools: list[jax.Array], scales, count) -> jax.Array:
    """The length, from the largest scale that did not overflow.

    NaN and infinity come out of the smallest scale.
    """
    pool, scale = pools[-1], np.asarray(scales[-1], pools[-1].dtype)
    # Chosen before the root, which a TPU would otherwise take at each scale.
    for larger, at in list(zip(pools, scales, strict=True))[-2::-1]:
        fits = jnp.isfinite(larger)
        pool, scale = jnp.where(fits, larger, pool), jnp.where(fits, scale.dtype.type(at), scale)
    return norm.finish(pool, count) / scale


def is_exact(pools: jax.Array, count, dtype, units: bool) -> jax.Array:
    """Whether all pools at scale 1 are exact: none overflowed, none lost terms that underflowed."""
    info = jnp.finfo(dtype)
    inside = pools >= count * np.asarray(info.tiny / info.eps, dtype)
    if units:
        # Some zeros among other norms do not need the other scales: dead units are common.
        some = jnp.any(pools > 0, axis=tuple(range(1, pools.ndim)), keepdims=True)
        inside |= (pools == 0) & some
    return jnp.all(inside & jnp.isfinite(pools))
