"""The gradients of all examples at one site: their norms and their weighted sum.

Neither forms them: both take the operands of the site and dy, the gradient of its result. An XLA
compiler for a GPU fuses no multiplication or select into a product of matrices, but writes a copy.
So on a GPU norms and sum share one copy of these factors, in which each example has its own unit,
and the weights multiply the smallest factor. On a CPU and a TPU the units cost nothing, and each
product makes what it needs. docs/performance.md has the numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.per_example.products import in_unit
from optaxclip.per_example.sites import Site
from optaxclip.per_example.weights import align, drop_unweighted
from optaxclip.trees import is_measured
from optaxclip.xla import widen


class AtSite(NamedTuple):
    """What the gradients at a site are made of. They are linear in each factor.

    Attributes:
      site: the site.
      factors: the operands, with None for the parameter, and dy behind them. Indices into a table
        are operands, too.
      scaled: the same in units; on a GPU, zeros for an example that is not finite.
      exponents: e, (B,): the unit of the gradient is 2ᵉ.
      finite: (B,), whether all factors of an example are finite.
    """

    site: Site
    factors: list[Any]
    scaled: list[Any]
    exponents: jax.Array
    finite: jax.Array


def find_units(site: Site, operands: list[Any], dy: jax.Array) -> AtSite:
    """Finds a unit for each example in each factor of a site."""
    scaled = [*operands, dy]
    scaled[-1], exponents, finite = in_unit(dy)
    for i, x in enumerate(operands):
        if is_measured(x):
            scaled[i], e, fine = in_unit(x)
            exponents, finite = exponents + e, finite & fine
    return AtSite(site, [*operands, dy], scaled, exponents, finite)


def site_norms(at: AtSite) -> jax.Array:
    """Computes ‖Gᵢ‖, (B,); NaN for an example that is not finite."""
    *operands, dy = at.scaled
    norms = jnp.ldexp(at.site.norms(operands, dy), at.exponents)
    # The zeros that stand for NaN on a GPU have a norm.
    return jnp.where(at.finite, norms, jnp.nan)


def site_sum(at: AtSite, param: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes Σᵢ weightsᵢ · Gᵢ of one site, by transposing its operation for all examples."""
    site = at.site

    def shared():
        factors, i = list(at.scaled), _find_smallest(at.scaled)
        factors[i] = _weigh(factors[i], jnp.ldexp(weights, at.exponents))
        return factors

    def apart():
        # All of them, because 0 · NaN is NaN.
        *clean, dy = [drop_unweighted(x, weights) if is_measured(x) else x for x in at.factors]
        return [*clean, _weigh(dy, weights)]

    *operands, dy = lax.platform_dependent(cuda=shared, rocm=shared, default=apart)

    def forward(param):
        value = site.origin(param)
        results = jax.vmap(lambda *xs: site.op(*xs[: site.side], value, *xs[site.side + 1 :])[0])
        return results(*operands)

    (total,) = jax.linear_transpose(forward, param)(dy)
    return widen(total)


def _find_smallest(factors: list[Any]) -> int:
    """Finds the smallest factor of those in the widest dtype."""
    # In float32 weights round nothing; next to it a factor may be bfloat16.
    numbers = {i: x for i, x in enumerate(factors) if is_measured(x)}
    return min(numbers, key=lambda i: (-numbers[i].dtype.itemsize, numbers[i].size))


def _weigh(x: jax.Array, weights: jax.Array) -> jax.Array:
    # In float32 and rounded once, because the transpose needs the dtypes of the operation.
    wide = widen(x)
    return (wide * align(weights.astype(wide.dtype), wide)).astype(x.dtype)
