"""Functions of singular values, without a decomposition.

Everything is computed by matrix products, which suit accelerators. The polar factor of X = U·Σ·Vᵀ,
which is U·Vᵀ, comes from an iteration that drives all singular values to 1. The polar factor of X
stacked on the identity has two blocks, and both clips at 1 follow from them:

    Y = X·(XᵀX + I)^-½     singular values y = σ / √(1 + σ²), the soft clip
    Z =   (XᵀX + I)^-½     singular values z = 1 / √(1 + σ²)
    Y / max(Z, Y)          min(σ, 1), the hard clip, because σ = y / z

Here nothing is larger than 1, and no divisor is smaller than √½. The usual form of the hard clip,
½(O + X - A·polar(A)ᵀ·O) with O = polar(X) and A = O - X, needs the polar factor of X itself, which
does not converge if X is nearly singular, and subtracts numbers as large as the largest singular
value.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.actions import rescale, smooth
from optaxclip.norms import l2
from optaxclip.xla import largest, root, times

Method = Literal["hard", "soft"]
Solver = Literal["polar", "svd"]

# Odd polynomials a·x + b·x³ + c·x⁵, found by linear programming. Each has the smallest possible
# maximum distance from 1 on the interval to which the ones before it map [0.03, 1.02], and is
# scaled to stay within 1. The first is repeated: each time it multiplies small numbers by 4, and it
# lets none over 0.03 fall below 0.12. The best polynomials for smaller numbers would let them fall
# almost to 0, which costs digits. The margin up to 1.02 keeps rounding errors from growing. The
# last is Newton's.
_POLYNOMIALS = np.array(
    [
        [4.0579, -10.9990, 7.7287],
        [3.7050, -8.5079, 5.6604],
        [2.7248, -3.6081, 1.8564],
        [1.9377, -1.3771, 0.4392],
        [1.8750, -1.2500, 0.3750],
    ]
)


FEWEST_STEPS = len(_POLYNOMIALS)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x.conj(), -1, -2)


def largest_entry(x: jax.Array) -> jax.Array:
    """The largest entry of each matrix, (..., 1, 1): its unit. Not finite if the matrix is not."""
    entries = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    return lax.stop_gradient(largest(entries, (-1, -2))[..., None, None])


def _per(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Divides `x` by `unit` (unless 0) in two steps: float32 cannot hold 1 / a large unit."""
    factor = 1 / jnp.sqrt(jnp.where(unit > 0, unit, 1))
    return times(times(x, factor), factor)


def _size(x: jax.Array) -> jax.Array:
    """The Frobenius norm, (..., 1, 1), which no singular value exceeds; `x` must not be large."""
    return root(jnp.sum(l2.lift(x), axis=(-1, -2), keepdims=True))


def _polar(x: jax.Array, steps: int) -> jax.Array:
    """The polar factor of (..., m, n) matrices with m ≥ n and σ from 0.03 · 4^(5 - steps) to 1."""
    first = _POLYNOMIALS[:1].repeat(steps - len(_POLYNOMIALS), axis=0)
    rows = np.concatenate([first, _POLYNOMIALS])

    def step(x, row):
        a, b, c = row
        # This is the smaller Gram matrix, because `_at_one` has transposed wide matrices.
        gram = _dot(_adjoint(x), x)
        return times(x, a) + _dot(x, times(gram, b) + times(_dot(gram, gram), c)), None

    return lax.scan(step, x, jnp.asarray(rows, x.real.dtype))[0]


def _identity(x: jax.Array) -> jax.Array:
    """An identity for each matrix, with the same number of columns."""
    n = x.shape[-1]
    return jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (*x.shape[:-2], n, n))


def _blocks(x: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Y and Z: singular values σ / √(1 + σ²) and 1 / √(1 + σ²)."""
    both = jnp.concatenate([x, _identity(x)], axis=-2)
    # Not the Frobenius norm of both, which grows with the identity and would slow convergence.
    both = _polar(_per(both, lax.stop_gradient(jnp.sqrt(1 + jnp.square(_size(x))))), steps)
    return both[..., : x.shape[-2], :], both[..., x.shape[-2] :, :]


def _hard(x: jax.Array, steps: int) -> jax.Array:
    """Singular values σ to min(σ, 1): Y · max(Z², I - Z²)^-½."""
    y, z = _blocks(x, steps)
    half, one = jnp.asarray(0.5, x.real.dtype), _identity(x)
    # Eigenvalues are within [-1, 1]; the sign of those near 0 does not matter.
    difference = 2 * _dot(_adjoint(z), z) - one
    magnitude = _dot(difference, _polar(difference, steps))
    larger = times(one + times(magnitude + _adjoint(magnitude), half), half)

    def newton(root, _):
        """Steps towards the inverse root, starting from I: all eigenvalues are in [½, 1]."""
        return times(_dot(root, 3 * one - _dot(larger, _dot(root, root))), half), None

    return _dot(y, lax.scan(newton, times(3 * one - larger, half), None, length=5)[0])


def _by_svd(x: jax.Array, method: Method) -> jax.Array:
    """Either clip at 1, by decomposition."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    s = jnp.minimum(s, 1) if method == "hard" else s / jnp.sqrt(1 + jnp.square(s))
    return _dot(times(u, s[..., None, :]), v)


def _at_one(x: jax.Array, method: Method, solver: Solver, steps: int) -> jax.Array:
    """Clips (batch, m, n) matrices at 1. A matrix of one column is a vector."""
    if x.shape[-2] < x.shape[-1]:
        return _adjoint(_at_one(_adjoint(x), method, solver, steps))
    if x.shape[-1] == 1:
        length, action = _size(x), rescale if method == "hard" else smooth(2.0)
        return times(x, action(length, jnp.ones_like(length)))
    if solver == "svd":
        return _by_svd(x, method)
    return _hard(x, steps) if method == "hard" else _blocks(x, steps)[0]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def clip_matrices(
    x: jax.Array, bound: jax.Array, method: Method, solver: Solver, steps: int
) -> jax.Array:
    """Clips (batch, m, n) matrices in units of the bound; scales those far over it down first."""
    entry, far = largest_entry(x), 14.0 * 4.0 ** (steps - len(_POLYNOMIALS))
    scaled, own = _per(x, entry), bound / jnp.where(entry > 0, entry, 1)
    size = _size(scaled)
    unit = jnp.where(jnp.isinf(own), 1, jnp.maximum(own, lax.stop_gradient(size / far)))
    out = _at_one(_per(scaled, unit), method, solver, steps)
    out = times(out, jnp.where(jnp.isinf(bound), 0, bound))
    same = jnp.isinf(own) | (size == 0) | ((size <= own) & (method == "hard"))
    return jnp.where(same, x, out)


@jax.jit
def largest_singular_values(x: jax.Array) -> jax.Array:
    """Estimates the largest σ of (batch, m, n) matrices, (batch,), by power iteration.

    It starts from fixed random numbers. If it started from the longest row, it would stay there if
    that row were orthogonal to many shorter ones that are alike.
    """
    entry = largest_entry(x)
    scaled = _per(x, entry)
    # With a fixed key the estimate is the same on all devices and in every run.
    start = jax.random.normal(jax.random.key(0), (x.shape[-1], 1), x.real.dtype).astype(x.dtype)

    def step(v, _):
        v = _dot(_adjoint(scaled), _dot(scaled, v))
        return _per(v, _size(v)), None

    v = jnp.broadcast_to(start, (*x.shape[:-2], *start.shape))
    # The first step apart, as its result may vary over devices where the start does not.
    v, _ = lax.scan(step, step(v, None)[0], None, length=15)
    found = _size(_dot(scaled, lax.stop_gradient(v))) * entry
    found = jnp.minimum(found, jnp.finfo(entry.dtype).max)
    return jnp.where(jnp.isfinite(entry), found, entry)[:, 0, 0]
