"""The dtype in which numbers are measured and scaled: at least float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def accumulator(arrays) -> np.dtype:
    """The dtype in which norms are taken: float64 if any leaf is that wide, else float32."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in arrays)
    return np.dtype(np.float64 if wide else np.float32)


def widen(x: jax.Array, dtype: DTypeLike = np.float32) -> jax.Array:
    """A leaf in at least `dtype`, or in the complex dtype of that width."""
    if jnp.finfo(x.dtype).bits >= jnp.finfo(dtype).bits:
        return x
    return x.astype(jnp.complex128 if jnp.iscomplexobj(x) else dtype)


def poison(fine: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where `fine`, NaN elsewhere."""
    # Not a `where` with a NaN constant, which `jax.debug_nans` would report even if it is not
    # selected. 0 / 0 makes a NaN only where one is wanted, and x / 1 is x.
    x = jnp.where(fine, x, jnp.zeros((), x.dtype))
    return x / fine.astype(x.dtype)


def largest(x: jax.Array, axis: Any = None) -> jax.Array:
    """The largest of numbers of at least 0; NaN if one is NaN, however they are sharded."""
    return from_order(jnp.max(in_order(x), axis, initial=0))


def smallest(x: jax.Array, axis: Any = None) -> jax.Array:
    """The smallest of numbers of at least 0; NaN if one is NaN, however they are sharded."""
    least = jnp.min(jnp.where(jnp.isnan(x), -1, in_order(x)), axis)
    return poison(least >= 0, from_order(jnp.maximum(least, 0)))


def in_order(x: jax.Array) -> jax.Array:
    """Floats of at least 0 as integers of the same order, in which NaN is the largest.

    A maximum is taken of these: an all-reduce of floats may drop NaN, as XLA:CPU's does.
    """
    whole = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    # The modulus again, because the NaN of a complex modulus may have its sign bit set.
    return lax.bitcast_convert_type(jnp.abs(x), whole)


def from_order(x: jax.Array) -> jax.Array:
    """The inverse of `in_order`."""
    return lax.bitcast_convert_type(x, jnp.float64 if x.dtype == jnp.int64 else jnp.float32)


def root(x: jax.Array) -> jax.Array:
    """√x, whose derivative at 0 is 0."""
    # Of `jnp.sqrt` it is infinite, and times the 0 of a branch that nobody takes it is NaN.
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` times a real factor, in the dtype of `x`."""
    factor = factor.astype(x.real.dtype)
    if not jnp.iscomplexobj(x):
        return x * factor
    # Not `x * factor`: JAX would make the factor complex, and multiplying by +0j loses the signs of
    # zeros.
    return lax.complex(x.real * factor, x.imag * factor)
