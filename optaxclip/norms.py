"""How long a block is.

A norm says what each number contributes, `|x|ᵖ`, how contributions are combined, and how the result
becomes a length. Its derivative is stated explicitly. At a block of zeros, where the norm has a
kink, the slope is set to 0, so that a clip is the identity near a zero gradient.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from optaxclip.base import Norm
from optaxclip.validate import fail, named


def _square(x):
    # Not |x|²: the modulus of a complex number would take a root only to square it again.
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


#: Euclidean length, √Σ|x|².
l2 = Norm("norms.l2", _square, "sum", lambda pool, count: jnp.sqrt(pool), lambda u, count: u, 2.0)

#: Sum of moduli, Σ|x|.
l1 = Norm("norms.l1", jnp.abs, "sum", lambda pool, count: pool, lambda u, count: jnp.sign(u), 1.0)

#: Largest modulus, max|x|. Its slope is that of the elements that reach it.
linf = Norm(
    "norms.linf",
    jnp.abs,
    "max",
    lambda pool, count: pool,
    # Not `>= 1`: XLA may divide by way of an inverse, which rounds, and then no element is 1.
    lambda u, count: jnp.where(jnp.abs(u) >= 1 - 2 * jnp.finfo(u.dtype).eps, jnp.sign(u), 0),
    1.0,
)

#: Root mean square, √(Σ|x|² / N).
rms = Norm(
    "norms.rms",
    _square,
    "sum",
    # A leaf of size 0 has a norm of 0, as with the other norms, and not 0 / 0.
    lambda pool, count: jnp.sqrt(pool / jnp.maximum(count, 1)),
    lambda u, count: u / count,
    2.0,
)


# Cached, because norms are static arguments of jitted functions: a new object would recompile.
@functools.cache
def _power(p: float) -> Norm:
    def slope(u, count):
        return jnp.sign(u) * (jnp.abs(u) ** (p - 1)).astype(u.dtype)

    return Norm(
        f"norms.lp({p:g})",
        lambda x: jnp.abs(x) ** p,
        "sum",
        lambda pool, count: pool ** (1 / p),
        slope,
        p,
    )


def _is_power(p: Any) -> bool:
    return isinstance(p, int | float) and not isinstance(p, bool) and p >= 1


@named
def lp(p: float) -> Norm:
    """The p-norm, (Σ|x|ᵖ)^(1/p), for p from 1 to inf.

    Raises:
      ValueError: if p is not a number of at least 1.

    >>> from optaxclip import norms
    >>> norms.lp(2), norms.lp(3)
    (norms.l2, norms.lp(3))
    """
    if not _is_power(p):
        raise fail("p must be a number from 1 to inf", p)
    known = {1.0: l1, 2.0: l2, math.inf: linf}
    return known.get(float(p)) or _power(float(p))


def as_norm(norm: Norm | float) -> Norm:
    """A norm, or the p-norm of a number p.

    Raises:
      ValueError: naming the call and what there is.
    """
    if isinstance(norm, Norm):
        return norm
    if not _is_power(norm):
        raise fail(
            "norm must be norms.l2, norms.l1, norms.linf, norms.rms, or a number p from 1 to inf",
            norm,
        )
    return lp(norm)


__all__ = ["l1", "l2", "linf", "lp", "rms"]
