"""The gradients of examples as products of factors, each with a leading axis of examples.

An XLA compiler for a GPU fuses no multiplication or select into a product of matrices, but writes a
copy. So there the norms and the weighted sum of a product share one copy of its factors, in which
each example has its own unit, and the weights multiply the smallest factor. On a CPU and a TPU the
units cost nothing, and each product makes what it needs. Bytes per parameter, for a transformer
block:

           one copy   separate copies
    H100   582        646
    CPU    758        673
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.trees import is_measured
from optaxclip.xla.widths import accumulator, poison, widen

# On a CPU, units treat an array whose squares all underflow as zeros. Next to an array with a norm
# above this, that makes no difference.
_LOST = 1e-10


def align(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Gives weights as many axes as `x`, to multiply it example by example."""
    return weights.reshape(weights.shape + (1,) * (x.ndim - 1))


def drop_unweighted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Replaces the examples of weight 0 by zeros, because 0 · NaN is NaN."""
    return jnp.where(align(weights, x) == 0, jnp.zeros_like(x), x)


def in_unit(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `x` in units of 2ᵉ, with one e per example, e, and which examples are finite.

    On a GPU an example that is not finite is zeros, because `weigh_factors` reads the same copy. On
    a CPU that select would make a copy.
    """
    largest = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)
    finite = jnp.isfinite(largest)
    # Keeps 2ᵉ and its inverse normal numbers: XLA flushes subnormal ones to zero.
    limit = jnp.finfo(x.dtype).maxexp - 2
    exponents = jnp.clip(jnp.frexp(largest.astype(accumulator([x])))[1], -limit, limit)
    # A power of two, so the product is exact.
    scaled = x * align(jnp.ldexp(jnp.ones((), x.dtype), -exponents), x)

    def clean(scaled):
        return jnp.where(align(finite, x), scaled, jnp.zeros_like(x))

    scaled = lax.platform_dependent(scaled, cuda=clean, rocm=clean, default=lambda x: x)
    return scaled, exponents, finite


def weigh_factors(
    factors: Sequence[Any], scaled: Sequence[Any], exponents: jax.Array, weights: jax.Array
) -> list[Any]:
    """Returns the factors of products whose sum over examples is the weighted sum.

    Args:
      factors: the factors, the last one in floating point. Indices and None stay as they are.
      scaled: the same in units, see `in_unit`.
      exponents: e, (B,): the unit of the product is 2ᵉ.
      weights: (B,). What has weight 0 need not be finite.
    """

    def shared():
        weighed, i = list(scaled), _find_smallest(scaled)
        weighed[i] = _weigh(scaled[i], jnp.ldexp(weights, exponents))
        return weighed

    def apart():
        # All of them, because 0 · NaN is NaN.
        *clean, last = [drop_unweighted(x, weights) if is_measured(x) else x for x in factors]
        return [*clean, _weigh(last, weights)]

    return lax.platform_dependent(cuda=shared, rocm=shared, default=apart)


def keep_apart(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Calls a function of arrays of examples, whose results are NaN for those that are not finite.

    For a convolution by groups, one for each example, XLA for TPUs puts zeros in place of the other
    groups and multiplies by all of them: one example with NaN would spoil all others.
    """

    def clean(*operands):
        axes = [tuple(range(1, x.ndim)) for x in operands]
        each = [jnp.all(jnp.isfinite(x), own) for x, own in zip(operands, axes, strict=True)]
        fine = functools.reduce(operator.and_, each)
        out = function(*(jnp.where(align(fine, x), x, jnp.zeros_like(x)) for x in operands))
        return poison(align(fine, out), out)

    # On a GPU these selects would write copies of all operands.
    return lax.platform_dependent(*operands, tpu=clean, default=function)


def measure_small(
    measure: Callable[[list[jax.Array]], jax.Array],
    measure_lifted: Callable[[list[jax.Array]], jax.Array],
    arrays: Sequence[jax.Array],
) -> jax.Array:
    """Norms of examples by `measure`; on a CPU those of at most 1e-10 by `measure_lifted`.

    Other platforms already measure units at two scales, and a branch would make a GPU wait for its
    host.
    """

    def checked(arrays):
        norms = measure(arrays)
        # NaN counts as fine: it is NaN at any scale.
        fine = ~(norms <= _LOST)
        return lax.cond(
            jnp.all(fine),
            lambda: norms,
            lambda: jnp.where(fine, norms, measure_lifted(arrays)),
        )

    return lax.platform_dependent(list(arrays), cpu=checked, default=measure)


def _find_smallest(factors: Sequence[Any]) -> int:
    """Finds the smallest factor of those in the widest dtype."""
    # In float32 weights round nothing; next to it a factor may be bfloat16.
    numbers = {i: x for i, x in enumerate(factors) if is_measured(x)}
    return min(numbers, key=lambda i: (-numbers[i].dtype.itemsize, numbers[i].size))


def _weigh(x: jax.Array, weights: jax.Array) -> jax.Array:
    # In float32 and rounded once, because the transpose needs the dtypes of the operation.
    wide = widen(x)
    return (wide * align(weights.astype(wide.dtype), wide)).astype(x.dtype)
