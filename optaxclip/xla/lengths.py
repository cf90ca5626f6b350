"""The norms of all blocks, right from 1e-36 to 1e36, in one read of the gradients.

Squares of float32 numbers overflow above 1.8e19 and underflow below 1e-22. Accelerators therefore
sum at three scales in one read (2^80, 1, 2^-80) and take the largest scale that did not overflow.
That needs no loop and no branch, whose condition a GPU would have to send to its host. On a CPU
three sums take three times as long as one. There a single sum is checked, and the other scales,
which are rarely needed, are in a `cond`.

The derivative is stated as <x, dx> / |x|, not differentiated through the sums: it is finite even
where the sum at one scale is not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from optaxclip.base import Norm, Norms
from optaxclip.xla.layout import Layout
from optaxclip.xla.mesh import hold_everywhere
from optaxclip.xla.scales import choose, is_exact, scales_of
from optaxclip.xla.scaling import spread
from optaxclip.xla.sums import lifted, plain, stacking, variadic
from optaxclip.xla.units import Pieces, join, stack, units
from optaxclip.xla.widths import accumulator, largest, widen


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def measure(norm: Norm, arrays: list[jax.Array], layout: Layout) -> Norms:
    """The norms of all blocks: a scalar, a vector or a list, see `optaxclip.base`.

    NaN if a block holds NaN; infinite if it holds infinity or its norm exceeds the largest float.
    """
    # Every norm of a single number is its modulus, and taking that needs no square to overflow.
    alone = layout.blocks.units and not any(map(layout.axes_of, range(len(arrays))))
    return _measure(_MODULUS if alone else norm, layout, arrays)


_MODULUS = Norm("modulus", jnp.abs, "max", lambda x, n: x, lambda u, n: jnp.sign(u), 1.0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measure(norm: Norm, layout: Layout, arrays: list[jax.Array]) -> Norms:
    """As `measure`."""
    if layout.blocks.axes is not None:
        layout.span.check_units()
        layout.check_layers()
    forms = _Forms(norm, layout, accumulator(arrays))
    lengths = lax.platform_dependent(
        arrays, cpu=forms.checked, cuda=forms.stacked, rocm=forms.stacked, default=forms.plain
    )
    return lengths if layout.blocks.units else lengths[0]


class _Forms:
    """The forms in which norms are taken; each is a function of the leaves."""

    def __init__(self, norm: Norm, layout: Layout, dtype: np.dtype):
        self.norm, self.layout, self.dtype = norm, layout, dtype
        self.scales = scales_of(norm, dtype, layout.blocks.units)
        self.counts = jax.tree.leaves(counts_of(layout, dtype))

    def plain(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """At all scales in one read."""
        return self._finish(self._pool(plain, arrays, self.scales))

    def stacked(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """At all scales in one read, leaves alike in one reduction."""
        return self._finish(self._pool(variadic, arrays, self.scales))

    def checked(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """At scale 1, and at the others only where that is not exact."""
        if len(self.scales) == 1 or not self.counts:
            return self.plain(arrays)
        units_, sums = self.layout.blocks.units, self.at(1.0, _apart(arrays))
        each = list(zip(sums, self.counts, strict=True))
        exact = jnp.all(jnp.array([is_exact(x, n, self.dtype, units_) for x, n in each]))
        if units_:
            # Of all devices: a branch that only some take makes all norms vary by type.
            exact = hold_everywhere(exact)
        lengths = [self.norm.finish(x, n) for x, n in each]
        return lax.cond(exact, lambda _: lengths, self._rescue, arrays)

    def _rescue(self, arrays):
        # One scale after another. In one read XLA:CPU would allocate a float32 copy of all narrow
        # leaves.
        scales = np.array(self.scales, self.dtype)
        return self._finish([[x] for x in lax.map(lambda s: self.at(s, arrays), scales)])

    def at(self, scale: ArrayLike, arrays: list[jax.Array], form=stacking) -> list[jax.Array]:
        """The sums at one scale."""
        each = zip(self._pool(form, arrays, (scale,)), self.counts, strict=True)
        return [join([x for (x,) in pieces], n.ndim) for pieces, n in each]

    def _pool(self, form, arrays, scales) -> list[Pieces]:
        """Sums of each array of norms, in pieces; named blocks are one array in one piece."""
        norm, layout, dtype = self.norm, self.layout, self.dtype
        # A scale for float64, such as 2^-640, underflows in float32: narrower leaves would vanish.
        if dtype == np.float64:
            arrays = [widen(x, dtype) for x in arrays]
        if layout.blocks.units:
            return units(norm, layout, arrays, scales, dtype, stacked=form is variadic)
        return [[list(_gathered(norm, layout, form(norm, layout, arrays, scales, dtype)))]]

    def _finish(self, pools: list[Pieces]) -> list[jax.Array]:
        each = zip(pools, self.counts, strict=True)
        return [_finish(self.norm, pieces, self.scales, n) for pieces, n in each]


def join_lengths(norm: Norm, lengths: jax.Array, count: ArrayLike = 1) -> jax.Array:
    """The length of a block, given those of its parts; infinite above the largest float."""
    scales = scales_of(norm, lengths.dtype, units=False)
    pools = [jnp.sum(lifted(norm, lengths, scale)) for scale in scales]
    return choose(norm, pools, scales, count)


def _finish(norm: Norm, pieces: Pieces, scales, count: np.ndarray) -> jax.Array:
    """The lengths in one array of norms."""
    if count.ndim != 1 or len(pieces) == 1:
        pools = [stack(list(at), count.ndim) for at in zip(*pieces, strict=True)]
        return choose(norm, pools, scales, count)
    # Units that are whole leaves are joined last: a TPU finishes scalars in passing.
    counts = np.split(count, np.cumsum([x.size for x, *_ in pieces])[:-1])
    each = zip(pieces, counts, strict=True)
    lengths = [choose(norm, pools, scales, n.reshape(pools[0].shape)) for pools, n in each]
    return join(lengths, 1)


def _apart(arrays):
    """Puts a barrier before narrow leaves, or XLA:CPU would keep one widened copy for all uses."""
    return [x if widen(x) is x else lax.optimization_barrier(x) for x in arrays]


def _gathered(norm: Norm, layout: Layout, parts) -> jax.Array:
    """Combines pools of parts into pools of blocks over all devices: (S, B), or (S,) for `tree`."""
    pools, first = parts
    pools, span = layout.among_all(pools, first), layout.span
    if span.axes and norm.pool == "sum":
        copies = [span.copies(leaf) for leaf in first for _ in layout.blocks_of(leaf)]
        pools = pools / np.array([copies], pools.dtype)
    if layout.blocks.names is None:
        pools = pools.sum(axis=1) if norm.pool == "sum" else largest(pools, 1)
    else:
        pools = pool_blocks(norm.pool, layout, pools, first)
    return span.pool(pools, norm.pool)


def pool_blocks(how: str, layout: Layout, pools: jax.Array, first: list[int]) -> jax.Array:
    """(S, P) to (S, B): combines the pools of each block."""
    count = len(layout.blocks.names or ())
    blocks = np.array([block for leaf in first for block in layout.blocks_of(leaf)], int)
    order = np.argsort(blocks, kind="stable")
    if np.array_equal(blocks[order], np.arange(count)):
        return pools if np.array_equal(blocks, blocks[order]) else pools[:, order]
    meet = jax.ops.segment_sum if how == "sum" else jax.ops.segment_max
    meet = functools.partial(meet, segment_ids=blocks[order], num_segments=count)
    return jax.vmap(functools.partial(meet, indices_are_sorted=True))(pools[:, order])


def counts_of(layout: Layout, dtype) -> Any:
    """The number of elements of each block, on all devices, in the shape of the norms."""
    sizes = [math.prod(shape) * layout.span.parts(i) for i, shape in enumerate(layout.shapes)]
    blocks = layout.blocks
    if blocks.units:
        rows = [_unit_counts(layout, row, sizes).astype(dtype) for row in layout.rows]
        return [np.concatenate([rows[r] for r in array]) for array in layout.arrays]
    if blocks.names is None:
        return np.asarray(sum(sizes), dtype)
    own = [layout.blocks_of(leaf) for leaf in range(len(sizes))]
    index = np.array([block for places in own for block in places], int)
    parts = [n / len(places) for n, places in zip(sizes, own, strict=True) for _ in places]
    return np.bincount(index, parts, len(blocks.names)).astype(dtype)


def _unit_counts(layout: Layout, row, sizes) -> np.ndarray:
    kept = layout.kept(row[0])
    return np.stack([np.full(kept, sizes[i] / max(math.prod(kept), 1)) for i in row])


@_measure.defjvp
def _measure_jvp(norm: Norm, layout: Layout, primals, tangents):
    (arrays,), (dots,) = primals, tangents
    lengths, dtype = _measure(norm, layout, arrays), accumulator(arrays)
    sizes = spread(jax.tree.map(lambda n: jnp.where(n > 0, n, 1), lengths), layout)
    counts = spread(jax.tree.map(jnp.asarray, counts_of(layout, dtype)), layout)
    each = zip(arrays, sizes, counts, dots, strict=True)
    parts = [_along(norm, x, n, count, dot) for x, n, count, dot in each]
    along = _Forms(_IDENTITY, layout, dtype).at(1, parts, plain)
    return lengths, along if layout.blocks.units else along[0]


# A plain sum: linear, so that the derivative can be transposed.
_IDENTITY = Norm("identity", lambda x: x, "sum", lambda pool, n: pool, lambda u, n: u, 1.0)


def _along(norm: Norm, x, length, count, dot) -> jax.Array:
    """<slope, dx>, element by element."""
    x, dot = widen(x), widen(dot)
    slope = norm.slope(_over(x, length.astype(x.real.dtype)), count.astype(x.real.dtype))
    if not jnp.iscomplexobj(x):
        return slope * dot
    return slope.real * dot.real + slope.imag * dot.imag


def _over(x: jax.Array, length: jax.Array) -> jax.Array:
    # Not times 1 / length, which rounds twice: the largest element over itself has to be exactly 1.
    return lax.complex(x.real / length, x.imag / length) if jnp.iscomplexobj(x) else x / length
