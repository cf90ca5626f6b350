"""The norms of all blocks, right from 1e-36 to 1e36, in one read, with the derivative of the norm
itself.

Squares of float32 numbers overflow above 1.8e19 and vanish below 1e-22. So accelerators pool at
three scales at once (2^80, 1, 2^-80), which costs no second read, and take the largest scale that
did not overflow: no loop and no branch, whose condition a GPU would read on the host. On a CPU,
where three sums take three times as long as one, one sum is checked, and the rare other scales are
in a `cond`.

The derivative is <x, dx> / |x|, stated as such: it is finite where the pool at one scale is not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.base import Norm, Norms
from optaxclip.xla.layout import Layout
from optaxclip.xla.scaling import spread
from optaxclip.xla.sums import plain, units, variadic
from optaxclip.xla.widths import accumulator, widen


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def measure(norm: Norm, arrays: list[jax.Array], layout: Layout) -> Norms:
    """The norms of all blocks: a scalar, a vector or a list, see `optaxclip.base`.

    NaN where a block holds NaN, infinite where it holds infinity or its norm is no float any more.
    """
    return _measure(norm, layout, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measure(norm: Norm, layout: Layout, arrays: list[jax.Array]) -> Norms:
    """As `measure`."""
    if layout.blocks.axes is not None:
        return _unit_lengths(norm, layout, arrays)
    return _block_lengths(norm, layout, arrays)


@_measure.defjvp
def _measure_jvp(norm: Norm, layout: Layout, primals, tangents):
    (arrays,), (dots,) = primals, tangents
    lengths = _measure(norm, layout, arrays)
    sizes = jax.tree.map(lambda n: jnp.where(n > 0, n, 1), lengths)
    counts = spread(jax.tree.map(jnp.asarray, counts_of(layout, accumulator(arrays))), layout)
    parts = [
        _along(norm, x, n, count, dot)
        for x, n, count, dot in zip(arrays, spread(sizes, layout), counts, dots, strict=True)
    ]
    return lengths, _summed(layout, parts, accumulator(arrays))


def _along(norm: Norm, x, length, count, dot) -> jax.Array:
    """<slope, dx>, element by element."""
    x, dot = widen(x), widen(dot)
    slope = norm.slope(_over(x, length.astype(x.real.dtype)), count.astype(x.real.dtype))
    if not jnp.iscomplexobj(x):
        return slope * dot
    return slope.real * dot.real + slope.imag * dot.imag


def _over(x: jax.Array, length: jax.Array) -> jax.Array:
    # Not times 1 / length: that rounds, and the largest element over itself has to be 1.
    return lax.complex(x.real / length, x.imag / length) if jnp.iscomplexobj(x) else x / length


def _summed(layout: Layout, parts, dtype) -> Norms:
    """Sums over the elements of each block, on all devices: linear, so that it can be transposed."""
    identity = Norm(
        "identity", lambda x: x, "sum", lambda pool, count: pool, lambda u, count: u, 1.0
    )
    if layout.blocks.axes is not None:
        return [row[0] for row in units(identity, layout, parts, (1.0,), dtype, stacked=False)]
    return _gathered(identity, layout, plain(identity, layout, parts, (1.0,), dtype))[0]


def scales_of(norm: Norm, dtype, units: bool) -> tuple[float, ...]:
    """The scales at which to pool, largest first; one where no float overflows or vanishes by the
    norm's power.

    A pool is exact while |x| is within 2^±(126 / p); scales 2^(160 / p) apart overlap by enough for
    a sum of a billion numbers.
    """
    if norm.pool == "max" or norm.power <= 1:
        return (1.0,)
    wide = jnp.finfo(dtype).maxexp / 128
    if units and norm.power == 2:
        # Two: a third costs 4 bytes per parameter on a GPU. They reach from 1e-36 to 1e36, and meet
        # where numbers 2^-63 of a unit's norm are lost, of a million in one unit.
        return (2.0 ** (57 * wide), 2.0 ** (-57 * wide))
    step = 160 / norm.power
    count = math.ceil((120 - 126 / norm.power) / step)
    return tuple(2.0 ** round(step * wide * i) for i in range(count, -count - 1, -1))


def _chosen(norm: Norm, pools, scales, count) -> jax.Array:
    """The length, from the largest scale that did not overflow. NaN and infinity come through the
    smallest.
    """
    length = norm.finish(pools[-1], count) / scales[-1]
    for pool, scale in list(zip(pools, scales, strict=True))[-2::-1]:
        length = jnp.where(pool < jnp.inf, norm.finish(pool, count) / scale, length)
    return length


def _block_lengths(norm: Norm, layout: Layout, arrays) -> jax.Array:
    dtype = accumulator(arrays)
    scales, counts = scales_of(norm, dtype, units=False), counts_of(layout, dtype)

    def pools_of(form, arrays, scales):
        return _gathered(norm, layout, form(norm, layout, arrays, scales, dtype))

    def at_all_scales(form, arrays):
        return _chosen(norm, pools_of(form, arrays, scales), scales, counts)

    everywhere = functools.partial(at_all_scales, plain)
    gpu = functools.partial(at_all_scales, variadic)
    if len(scales) == 1:
        return lax.platform_dependent(arrays, cuda=gpu, rocm=gpu, default=everywhere)
    small = functools.partial(plain, stacked=True)

    def rescue(arrays):
        # One scale after another: all in one read, XLA:CPU would keep room for a float32 copy of
        # narrow leaves.
        def at(scale):
            return pools_of(small, _tied(arrays, scale), (scale,))[0]

        pools = lax.map(at, np.asarray(scales, dtype))
        return _chosen(norm, pools, scales, counts)

    def checked(arrays):
        pool = pools_of(small, _apart(arrays), (1.0,))[0]
        inside = (pool >= counts * _lowest(dtype)) & (pool < jnp.inf)
        return lax.cond(jnp.all(inside), lambda _: norm.finish(pool, counts), rescue, arrays)

    return lax.platform_dependent(arrays, cpu=checked, cuda=gpu, rocm=gpu, default=everywhere)


def _lowest(dtype):
    """A pool below this, for each element, may have lost what vanished."""
    info = jnp.finfo(dtype)
    return np.asarray(info.tiny / info.eps, dtype)


def _apart(arrays):
    """Narrow leaves behind a barrier: XLA:CPU would widen them once for all their uses, and keep
    that copy.
    """
    return [x if widen(x) is x else lax.optimization_barrier(x) for x in arrays]


def _tied(arrays, scale):
    """The same inside a loop over scales, before which XLA would widen them, but for what changes
    in the loop.
    """
    return [x if widen(x) is x else lax.optimization_barrier((x, scale))[0] for x in arrays]


def _gathered(norm: Norm, layout: Layout, parts) -> jax.Array:
    """Pools of parts as pools of blocks, over all devices: (S, B), or (S,) for the one block of
    `tree`.
    """
    pools, first = parts
    names, span = layout.blocks.names, layout.span
    if span.axes and norm.pool == "sum":
        pools = pools / np.array([[span.copies(i) for i in first]], pools.dtype)
    if names is None:
        pools = jnp.sum(pools, axis=1) if norm.pool == "sum" else jnp.max(pools, axis=1, initial=0)
    else:
        pools = _segments(norm, layout, pools, first)
    return span.pool(pools, norm.pool)


def _segments(norm: Norm, layout: Layout, pools: jax.Array, first: list[int]) -> jax.Array:
    """(S, P) to (S, B): the pools of each block met."""
    count, blocks = len(layout.blocks.names), np.array([layout.blocks.index[i] for i in first], int)
    order = np.argsort(blocks, kind="stable")
    if np.array_equal(blocks[order], np.arange(count)):
        return pools if np.array_equal(blocks, blocks[order]) else pools[:, order]
    meet = jax.ops.segment_sum if norm.pool == "sum" else jax.ops.segment_max
    meet = functools.partial(
        meet, segment_ids=blocks[order], num_segments=count, indices_are_sorted=True
    )
    return jax.vmap(meet)(pools[:, order])


def _unit_lengths(norm: Norm, layout: Layout, arrays) -> list[jax.Array]:
    layout.span.check_units()
    dtype = accumulator(arrays)
    scales, counts = scales_of(norm, dtype, units=True), counts_of(layout, dtype)

    def at_all_scales(stacked, arrays):
        rows = units(norm, layout, arrays, scales, dtype, stacked=stacked)
        return [
            _chosen(norm, pools, scales, count) for pools, count in zip(rows, counts, strict=True)
        ]

    def one_scale(arrays, scale):
        return [pools[0] for pools in units(norm, layout, arrays, (scale,), dtype, stacked=False)]

    def rescue(arrays):
        rows = lax.map(
            lambda scale: one_scale(_tied(arrays, scale), scale), np.asarray(scales, dtype)
        )
        return [
            _chosen(norm, pools, scales, count) for pools, count in zip(rows, counts, strict=True)
        ]

    def checked(arrays):
        rows = one_scale(_apart(arrays), (1.0,))
        inside = [
            jnp.all(_unit_inside(x, n * _lowest(dtype))) for x, n in zip(rows, counts, strict=True)
        ]
        plain_lengths = [norm.finish(x, n) for x, n in zip(rows, counts, strict=True)]
        return (
            lax.cond(jnp.all(jnp.stack(inside)), lambda _: plain_lengths, rescue, arrays)
            if rows
            else []
        )

    everywhere, gpu = (
        functools.partial(at_all_scales, False),
        functools.partial(at_all_scales, True),
    )
    cpu = checked if len(scales) > 1 else everywhere
    return lax.platform_dependent(arrays, cpu=cpu, cuda=gpu, rocm=gpu, default=everywhere)


def _unit_inside(pools: jax.Array, lowest) -> jax.Array:
    """Whether pools are exact. A zero beside others is no reason to look again: dead units are
    common.
    """
    rest = tuple(range(1, pools.ndim))
    zero = (pools == 0) & jnp.any(pools > 0, axis=rest, keepdims=True)
    return (zero | (pools >= lowest)) & (pools < jnp.inf)


def counts_of(layout: Layout, dtype) -> Any:
    """The number of elements of each block, on all devices, in the shape of the norms."""
    sizes = [math.prod(shape) * layout.span.parts(i) for i, shape in enumerate(layout.shapes)]
    blocks = layout.blocks
    if blocks.axes is not None:
        return [_unit_counts(layout, row, sizes).astype(dtype) for row in layout.rows]
    if blocks.names is None:
        return np.asarray(sum(sizes), dtype)
    return np.bincount(np.array(blocks.index, int), sizes, len(blocks.names)).astype(dtype)


def _unit_counts(layout: Layout, row, sizes) -> np.ndarray:
    shape, axes = layout.shapes[row[0]], layout.blocks.axes[row[0]]
    kept = [n for axis, n in enumerate(shape) if axis not in axes]
    return np.stack([np.full(kept, sizes[i] / max(math.prod(kept), 1)) for i in row])
