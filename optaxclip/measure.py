"""Measures a tree: in one read of the gradients, in any dtype, at any magnitude, across devices.

Contributions are pooled leaf by leaf first, in float32 at least, and only the small results meet.

Squares of float32 numbers overflow above 1.8e19 and vanish below 1e-22.  So the pool is checked and, where it left the
range in which it is exact, the blocks concerned are measured again, scaled by powers of two.  The first look, at scale
1, is the first turn of the same loop: so there is one read of the gradients in the program, one in the common case, and
one all-reduce where they are spread over devices.

What is best for XLA's CPU compiler, and no harm to others, is done where there is one device (`alone`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.leaves import bunches, map_blocks, one_vector, pack, side_by_side, unpack
from optaxclip.mesh import Span, alone
from optaxclip.norms import MAX, Norm, accumulator, times, widen


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
    joined, apart = _same, _same
    if cut.local and len(counts) > 1 and alone():  # one operation on all units, not one on each leaf's: compiles faster
        joined, apart = pack, functools.partial(unpack, like=counts)
        counts = np.concatenate([n.ravel() for n in counts])
    contributions = functools.partial(_in_units if cut.local else _in_leaves, norm, dtype, cut.axes, span)

    def pooled(arrays, scales=None):
        return joined(cut.gather(contributions(arrays, scales or [None] * len(arrays)), norm.pool, span))

    @jax.custom_jvp  # a while loop has no reverse mode: the derivative is that of the pool, at the scale that was found
    def search(arrays):
        def look_at(look, scale):
            def scaled():
                return pooled(arrays, [scale] * len(arrays))

            # Without a factor XLA's CPU compiler reduces in two thirds of the time, but a branch is compiled twice.
            plain = alone() and jax.default_backend() == "cpu" and len(arrays) <= 512
            return lax.cond(look == 0, lambda: pooled(arrays), scaled) if plain else scaled()

        return _search(look_at, _looks(norm, arrays, counts, cut, span))

    @search.defjvp
    def search_jvp(primals, tangents):
        pools, scales = search(*primals)
        leaf_scales = cut.spread(apart(scales), jax.tree.map(jnp.ones_like, apart(scales)))
        _, pools_dot = jax.jvp(lambda arrays: pooled(arrays, leaf_scales), primals, tangents)
        return (pools, scales), (pools_dot, jax.tree.map(jnp.zeros_like, scales))

    pools, scales = search(arrays)
    lengths = map_blocks(functools.partial(_length, norm), 3, pools, counts, scales)
    return Measured(*map(apart, lengths))


def _same(x):
    return x


def _in_units(norm: Norm, dtype, axes, span, arrays, scales) -> list[jax.Array]:
    """The pooled contributions of each unit, one array a leaf."""
    parts = map(functools.partial(_part, norm), arrays, scales, axes)
    return [part.astype(dtype) for part in parts]


def _in_leaves(norm: Norm, dtype, axes, span: Span, arrays, scales) -> jax.Array:
    """The pooled contributions of each leaf, in one vector.

    XLA's CPU compiler takes its time for every array, however small: small ones are laid side by side. That copies
    little, but must not be done to arrays that are spread over devices: XLA would gather each of them.
    """
    rows = bunches(arrays) if alone() and not span.axes else [[i] for i in range(len(arrays))]
    parts = []
    for row in rows:
        of_row = [scales[i] for i in row]
        scale = of_row[0] if all(s is of_row[0] for s in of_row) else jnp.stack(of_row)[:, None]
        x = arrays[row[0]] if len(row) == 1 else side_by_side([arrays[i] for i in row])
        parts.append(_part(norm, x, scale, None if len(row) == 1 else (1,)).astype(dtype).ravel())
    return one_vector(parts)[np.argsort([i for row in rows for i in row])]


def _part(norm: Norm, x: jax.Array, scale, axes) -> jax.Array:
    """The pooled contributions of one leaf, scaled; None: as it is.

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


def _search(look_at, looks: _Looks):
    """The pools, and the scales at which they are exact: looks, at one scale after another, until all blocks settle."""
    nothing = jax.eval_shape(look_at, 0, looks.scales[0])
    zeros, ones = jax.tree.map(jnp.zeros_like, nothing), jax.tree.map(jnp.ones_like, nothing)

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

        return look + 1, *map_blocks(better, 2, pools, scales, looks.lowest, look_at(look, scale))

    if len(looks.scales) == 1:
        return look_at(0, looks.scales[0]), ones
    return lax.while_loop(unsettled, again, (0, zeros, ones))[1:]
