"""How many elements of each block are how large, in one read of the gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.xla.layout import Layout
from optaxclip.xla.lengths import pool_blocks
from optaxclip.xla.sums import STACKED, reduce_alike
from optaxclip.xla.widths import widen


def count_reaching(arrays: list[jax.Array], layout: Layout, sizes: Sequence[float]) -> jax.Array:
    """int32 (sizes, B), how many elements of each block have at least each size; NaN has none."""
    form = functools.partial(_count, layout=layout, sizes=sizes)
    stacked, apart = functools.partial(form, most=STACKED), functools.partial(form, most=1)
    return lax.platform_dependent(arrays, cuda=stacked, rocm=stacked, default=apart)


def _count(arrays: list[jax.Array], layout: Layout, sizes: Sequence[float], most: int) -> jax.Array:
    # An operand for each size, not an axis of sizes: over that XLA:CPU would sum without vector
    # instructions, in a hundred times the time, and a GPU out of the order of its memory.
    def reaching(x: jax.Array) -> list[jax.Array]:
        size = jnp.abs(widen(x))
        # XLA:CPU takes |x| >= 0 for granted, of NaN as well.
        reached = [size >= jnp.asarray(s, size.dtype) if s else ~jnp.isnan(size) for s in sizes]
        return [x.astype(jnp.int32) for x in reached]

    pools, first = [jnp.zeros((len(sizes), 0), jnp.int32)], []
    for leaves, counts in reduce_alike(reaching, "sum", layout, arrays, most):
        # Not over all axes at once, less the copies: so many elements may be no int32.
        own = jnp.stack(counts).reshape(len(sizes), -1)
        own = layout.among_all(own, leaves)
        pools.append(layout.span.pool_leaf(own, leaves[0], "sum"))
        first.extend(leaves)
    return pool_blocks("sum", layout, jnp.concatenate(pools, axis=1), first)
