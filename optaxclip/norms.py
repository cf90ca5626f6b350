"""How long a block is: what a number contributes, how contributions meet, and what turns them into a length.

A norm is a contribution a number (`lift`), a way to pool contributions (`pool`) and what turns the pool into a length
(`finish`).  How a tree is measured by one, in one read, is told in `optaxclip.measure`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Pool(NamedTuple):
    """How contributions meet: inside a leaf, between the leaves of a group, and across devices."""

    reduce: Callable[..., jax.Array]
    segment: Callable[..., jax.Array]
    across: Callable[..., Any]


SUM = Pool(jnp.sum, jax.ops.segment_sum, lax.psum)
# An empty leaf has no largest element: it counts as 0. (A segment without leaves does not occur.)
MAX = Pool(lambda x, **kw: jnp.max(x, initial=0, **kw), jax.ops.segment_max, lax.pmax)


class Norm(NamedTuple):
    """A way to measure a block.

    Attributes:
      lift: maps numbers to their contributions, 0 to 0.
      pool: how contributions meet, `SUM` or `MAX`.
      finish: maps the pooled contributions and the number of elements to a length.
      power: contributions grow as |x|^power; it tells in which range the pool is exact.
    """

    lift: Callable[[jax.Array], jax.Array]
    pool: Pool
    finish: Callable[[jax.Array, Any], jax.Array]
    power: float


def _square(x):
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _root(x, p: float):
    """x^(1/p) for x >= 0, with derivative 0 at 0 (so that a clip is the identity near a zero gradient)."""
    some = jnp.where(x == 0, 1, x)  # `x == 0`, not `x > 0`: a NaN must come out as NaN
    return jnp.where(x == 0, 0, jnp.sqrt(some) if p == 2 else some ** (1 / p))


#: Euclidean length, √Σ|x|².
l2 = Norm(_square, SUM, lambda pooled, count: _root(pooled, 2), 2.0)
#: Sum of moduli, Σ|x|.
l1 = Norm(jnp.abs, SUM, lambda pooled, count: pooled, 1.0)
#: Largest modulus, max|x|.
linf = Norm(jnp.abs, MAX, lambda pooled, count: pooled, 1.0)
#: Root mean square, √(Σ|x|² / N).
rms = Norm(_square, SUM, lambda pooled, count: _root(pooled / jnp.maximum(count, 1), 2), 2.0)


def _is_power(p: Any) -> bool:
    return isinstance(p, int | float) and not isinstance(p, bool) and p >= 1


def lp(p: float) -> Norm:
    """The p-norm, (Σ|x|ᵖ)^(1/p), for p from 1 to inf.

    Raises:
      ValueError: if p is not a number of at least 1.
    """
    if not _is_power(p):
        raise ValueError(f"lp: p must be a number from 1 to inf, got {p!r}.")
    known = {1.0: l1, 2.0: l2, math.inf: linf}
    return known.get(float(p)) or Norm(lambda x: jnp.abs(x) ** p, SUM, lambda pooled, count: _root(pooled, p), float(p))


def as_norm(norm: Norm | float, call: str) -> Norm:
    """A norm, or the p-norm of a number p.

    Raises:
      ValueError: naming the call and what there is.
    """
    if isinstance(norm, Norm):
        return norm
    if not _is_power(norm):
        choices = "optaxclip.l2, l1, linf, rms or a number from 1 to inf"
        raise ValueError(f"{call}: norm must be {choices}, got {norm!r}.")
    return lp(norm)


def accumulator(arrays) -> np.dtype:
    """The dtype in which norms are taken: float64 if any leaf is that wide, else float32."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """A leaf in at least float32 (or complex64), where it is measured and scaled."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` times a real factor. JAX would make it complex for a complex `x`, and lose the sign of zeros."""
    factor = factor.astype(x.real.dtype)
    return lax.complex(x.real * factor, x.imag * factor) if jnp.iscomplexobj(x) else x * factor
