"""Norms of sums of outer products, Σₜ xₜ ⊗ dyₜ, without forming the sums.

Each example comes in its own unit (`xla.in_unit`), so that squares neither overflow nor vanish.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.xla import accumulator


def length(squares: jax.Array) -> jax.Array:
    """Computes √squares. NaN stays NaN."""
    # If the products cancel, rounding can make their sum negative.
    return jnp.sqrt(jnp.maximum(squares, 0))


def total(products: jax.Array) -> jax.Array:
    """Sums over all axes except that of the examples."""
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


def product_squares(parts: list[jax.Array], dy: jax.Array, pairs: bool) -> jax.Array:
    """Computes ‖Σₜ xₜ ⊗ dyₜ‖² for dy: (B, T, p), and x: (B, T, d) in parts along d.

    It uses pairs of rows, Σₛₜ ⟨xₛ, xₜ⟩ · ⟨dyₛ, dyₜ⟩, or forms the sum.
    """
    wide = accumulator([dy, *parts])
    if pairs:
        return total(sum(_gram(x).astype(wide) for x in parts) * _gram(dy).astype(wide))
    form = functools.partial(
        jnp.einsum, "btd,btp->bdp", precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )
    return jnp.sum(jnp.stack([total(jnp.square(form(x, dy))) for x in parts]), axis=0)


def row_norms(ids: jax.Array, dy: jax.Array) -> jax.Array:
    """Computes ‖Σₜ onehot(idₜ) ⊗ dyₜ‖ for ids: (B, T) and dy: (B, T, p)."""
    return length(total(jnp.where(ids[:, :, None] == ids[:, None, :], _gram(dy), 0)))


def _gram(x: jax.Array) -> jax.Array:
    """Computes the inner products of all pairs of rows, (B, T, T), in float32 at least."""
    wide = accumulator([x])
    # A product of one-row matrices is slow.
    if x.shape[1] == 1:
        return jnp.sum(jnp.square(x.astype(wide)), axis=2, keepdims=True)
    return jnp.einsum(
        "bsd,btd->bst", x, x, precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )
