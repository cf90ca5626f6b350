"""How long a block is: measured in one read of the gradients, in any dtype, at any magnitude, across devices.

A norm is a contribution a number (`lift`), a way to pool contributions (`pool`) and what turns the pool into a length
(`finish`).  Contributions are pooled leaf by leaf first, in float32 at least, and only the small results meet.

Squares of float32 numbers overflow above 1.8e19 and vanish below 1e-22.  So the pool is checked and, where it left the
range in which it is exact, the blocks concerned are measured again, scaled by powers of two, in a loop that does not
run at all in the common case.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.leaves import map_blocks
from optaxclip.mesh import Span


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
      lift: maps numbers to their contributions.
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


def lp(p: float) -> Norm:
    """The p-norm, (Σ|x|ᵖ)^(1/p), for p from 1 to inf.

    Raises:
      ValueError: if p is not a number of at least 1.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not p >= 1:
        raise ValueError(f"lp: p must be a number from 1 to inf, got {p!r}.")
    known = {1.0: l1, 2.0: l2, math.inf: linf}
    return known.get(float(p)) or Norm(lambda x: jnp.abs(x) ** p, SUM, lambda pooled, count: _root(pooled, p), float(p))


def as_norm(norm: Norm | float) -> Norm:
    """A norm, or the p-norm of a number p."""
    return norm if isinstance(norm, Norm) else lp(norm)


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


class Measured(NamedTuple):
    """The lengths of all blocks.

    Attributes:
      norms: the lengths, one shape with bounds and factors; the largest float where a length is beyond it.
      units: the unit of `lengths`: 1, or a power of two below 1 for blocks longer than 2¹⁰⁰.
      lengths: `norms * units`, exact where `norms` cannot be.
    """

    norms: Any
    units: Any
    lengths: Any


def measure(norm: Norm, arrays: list[jax.Array], cut, span: Span) -> Measured:
    """Measures every block of a tree.

    Args:
      norm: the norm.
      arrays: the measured leaves.
      cut: how the leaves are cut into blocks, see `optaxclip.scopes.Cut`.
      span: over which devices each leaf is spread.
    """
    dtype = accumulator(arrays)
    counts = jax.tree.map(lambda n: n.astype(dtype), cut.count([span.size(i) for i in range(len(arrays))]))

    def pooled(arrays, scales=None):
        parts = map(functools.partial(_part, norm), arrays, scales or [None] * len(arrays), cut.axes)
        return cut.gather([part.astype(dtype) for part in parts], norm.pool, span)

    @jax.custom_jvp  # a while loop has no reverse mode: the derivative is that of the pool, at the scale that was found
    def search(arrays):
        pools = pooled(arrays)
        ones = jax.tree.map(lambda p: jnp.where(p == 0, dtype.type(1), dtype.type(1)), pools)  # of the type of p
        looks = _looks(norm, arrays, counts, cut, span)
        return _look_again(lambda scale: pooled(arrays, [scale] * len(arrays)), pools, ones, looks)

    @search.defjvp
    def search_jvp(primals, tangents):
        pools, scales = search(*primals)
        leaf_scales = cut.spread(scales, jax.tree.map(jnp.ones_like, scales))
        _, pools_dot = jax.jvp(lambda arrays: pooled(arrays, leaf_scales), primals, tangents)
        return (pools, scales), (pools_dot, jax.tree.map(jnp.zeros_like, scales))

    pools, scales = search(arrays)
    return Measured(*map_blocks(functools.partial(_length, norm), 3, pools, counts, scales))


def _part(norm: Norm, x: jax.Array, scale, axes) -> jax.Array:
    """The pooled contributions of one leaf, scaled; None: as it is, the form that XLA reduces without a copy.

    The barriers keep XLA from widening or scaling a leaf once for all its uses, which would keep a copy of it.
    """
    if scale is None:
        x = widen(lax.optimization_barrier(x) if widen(x) is not x else x)
    else:
        x, scale = lax.optimization_barrier((x, scale))
        x = times(widen(x), scale)
    return norm.pool.reduce(norm.lift(x), axis=axes, keepdims=axes is not None)


def _length(norm: Norm, pool, count, scale):
    """The fields of `Measured` for one block, or one array of them."""
    length = norm.finish(pool, count)
    unit = jnp.where((scale < 1) & (length > 2.0**20), scale, 1).astype(pool.dtype)
    length = jnp.where(unit < 1, length, length / scale)
    largest = jnp.where(jnp.isfinite(length), jnp.finfo(pool.dtype).max, length)
    return jnp.minimum(length / unit, largest), unit, length


class _Looks(NamedTuple):
    """When to look again, and how.

    Attributes:
      scales: the scales, one a look: 1; larger ones, for what vanishes; smaller ones, for what overflows.
      lowest: below this, a pool at scale 1 may have lost numbers that vanished.
      agreed: makes one decision of those of all devices.
    """

    scales: np.ndarray
    lowest: Any
    agreed: Callable[[jax.Array], jax.Array]

    def settled(self, pool, scale, lowest):
        """In range; or still nothing at the largest scale, where nothing is left to find."""
        return ((pool >= lowest) | (scale == self.scales.max())) & (pool < jnp.inf)


def _looks(norm: Norm, arrays, counts, cut, span: Span) -> _Looks:
    """The looks that a tree may need; one where its dtypes are narrow, or the norm is a maximum.

    Each step moves the range in which a pool is exact by a bit less than its width.
    """
    info = jnp.finfo(accumulator(arrays))
    lowest = jax.tree.map(lambda n: (n * (info.tiny / info.eps / 2)).astype(info.dtype), counts)
    narrow = norm.power <= 2 and all(jnp.finfo(x.dtype).maxexp <= 16 for x in arrays)
    steps = range(1, 1 if norm.pool is MAX or narrow else max(2, math.ceil(norm.power)))
    width = int(1.25 * info.maxexp / max(norm.power, 2))
    exponents = [min(width * i, info.maxexp - 4) for i in steps]
    scales = np.array([1.0, *(2.0**e for e in exponents), *(2.0**-e for e in exponents)], info.dtype)
    return _Looks(scales, lowest, span.any if cut.local else lambda left: left)


def _look_again(pooled, pools, scales, looks: _Looks):
    """The pools, and the scales at which they are exact: looks again, at other scales, while a block is not settled."""

    def unsettled(carry):
        look, *found = carry
        done = [jnp.all(block) for block in jax.tree.leaves(jax.tree.map(looks.settled, *found, looks.lowest))]
        return (look < len(looks.scales)) & looks.agreed(~jnp.all(jnp.array(done)))

    def again(carry):
        look, pools, scales = carry
        scale = jnp.asarray(looks.scales)[look]

        def better(old, old_scale, lowest, new):
            keep = looks.settled(old, old_scale, lowest)
            return jnp.where(keep, old, new), jnp.where(keep, old_scale, scale)

        return look + 1, *map_blocks(better, 2, pools, scales, looks.lowest, pooled(scale))

    if len(looks.scales) == 1:
        return pools, scales
    return lax.while_loop(unsettled, again, (1, pools, scales))[1:]
