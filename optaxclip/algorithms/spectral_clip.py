"""Clipping the singular values of matrices: what a few bad examples inflate is a few singular directions.

Everything is products of matrices, for accelerators: no decomposition.  The polar factor of X = U·Σ·Vᵀ, which is U·Vᵀ,
comes from an iteration that drives all singular values to 1.  In units of the bound, the polar factor of X on top of
the identity has two blocks, and both clips follow from them:

    Y = X·(XᵀX + I)^-½     singular values y = σ / √(1 + σ²), the soft clip
    Z =   (XᵀX + I)^-½     singular values z = 1 / √(1 + σ²)
    Y / max(Z, Y)          min(σ, 1), the hard clip, because σ = y / z

Here nothing is larger than 1 and nothing that is divided by is smaller than √½.  The usual form of the hard clip,
½(O + X - A·polar(A)ᵀ·O) with O = polar(X) and A = O - X, takes the polar factor of X itself, which does not converge
where X is nearly singular, and subtracts numbers as large as the largest singular value.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.apply import Nonfinite, as_dtype_of
from optaxclip.core import ClipState
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.mesh import Span
from optaxclip.norms import MAX, accumulator, times, widen
from optaxclip.record import Step, fresh_metrics, named_blocks, recorded
from optaxclip.scopes import leaf
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite

Method = Literal["hard", "soft"]
Solver = Literal["polar", "svd"]

# Odd polynomials a·x + b·x³ + c·x⁵, each the best of its degree on what the one before leaves of [4·10⁻⁴, 1.02] (the
# largest distance from 1 is smallest), scaled to stay within 1; found by linear programming. The room up to 1.02 keeps
# rounding from growing, and the last is Newton and Schulz's.
_POLYNOMIALS = np.array(
    [
        [4.1721, -11.8989, 8.4882],
        [4.1670, -11.8580, 8.4536],
        [4.1459, -11.6884, 8.3101],
        [4.0579, -10.9990, 7.7287],
        [3.7050, -8.5079, 5.6604],
        [2.7248, -3.6081, 1.8564],
        [1.9377, -1.3771, 0.4392],
        [1.8750, -1.2500, 0.3750],
    ]
)
_FAR = 1e3  # bounds; beyond it the polar factor would not converge


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x.conj(), -1, -2)


def _size(x: jax.Array) -> jax.Array:
    """A bound of the largest singular value, (..., 1, 1): the Frobenius norm, taken in units of the largest entry."""
    largest = jnp.max(jnp.abs(x), axis=(-1, -2), keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum(jnp.square(jnp.abs(times(x, 1 / unit))), axis=(-1, -2), keepdims=True))


def _polar(x: jax.Array) -> jax.Array:
    """The polar factor of (..., m, n) matrices, m >= n: for singular values over 4·10⁻⁴ of the Frobenius norm."""
    size = _size(x)
    x = times(x, 1 / jnp.where(size > 0, size, 1))

    def step(x, row):
        a, b, c = row
        gram = _dot(_adjoint(x), x)
        return times(x, a) + _dot(x, times(gram, b) + times(_dot(gram, gram), c)), None

    return lax.scan(step, x, jnp.asarray(_POLYNOMIALS, x.real.dtype))[0]


def _identity(x: jax.Array) -> jax.Array:
    """The identity of the columns of each matrix."""
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), (*x.shape[:-2], x.shape[-1], x.shape[-1]))


def _blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Y and Z: singular values σ / √(1 + σ²) and 1 / √(1 + σ²)."""
    both = _polar(jnp.concatenate([x, _identity(x)], axis=-2))
    return both[..., : x.shape[-2], :], both[..., x.shape[-2] :, :]


def _hard(x: jax.Array) -> jax.Array:
    """Singular values σ to min(σ, 1): Y · max(Z², I - Z²)^-½."""
    y, z = _blocks(x)
    half, one = jnp.asarray(0.5, x.real.dtype), _identity(x)
    difference = 2 * _dot(_adjoint(z), z) - one
    magnitude = _dot(difference, _polar(difference))
    larger = times(one + times(magnitude + _adjoint(magnitude), half), half)

    def newton(root, _):
        """One step towards the inverse root; from I, as all eigenvalues are in [½, 1]."""
        return times(_dot(root, 3 * one - _dot(larger, _dot(root, root))), half), None

    return _dot(y, lax.scan(newton, one, None, length=6)[0])


def _soft(x: jax.Array) -> jax.Array:
    """Singular values σ to σ / √(1 + σ²)."""
    return _blocks(x)[0]


def _by_svd(x: jax.Array, method: Method) -> jax.Array:
    """Either, by decomposition."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    s = jnp.minimum(s, 1) if method == "hard" else s / jnp.sqrt(1 + jnp.square(s))
    return _dot(times(u, s[..., None, :]), v)


def _clipped(x: jax.Array, bound: jax.Array, method: Method, solver: Solver) -> jax.Array:
    """(batch, m, n) matrices, clipped in units of the bound; those far over it are first scaled to 1,000 times it."""
    size = _size(x)
    some = (bound > 0) & jnp.isfinite(bound)
    unit = jnp.where(some, jnp.maximum(bound, size / _FAR), jnp.where(size > 0, size, 1))
    scaled = times(x, 1 / unit)
    tall = scaled if x.shape[-2] >= x.shape[-1] else _adjoint(scaled)
    out = _by_svd(tall, method) if solver == "svd" else {"hard": _hard, "soft": _soft}[method](tall)
    out = times(out if x.shape[-2] >= x.shape[-1] else _adjoint(out), jnp.where(some, bound, 0))
    same = jnp.isinf(bound) | (size == 0) | ((size <= bound) & (method == "hard"))
    return jnp.where(same, x, out)


def _matrices(x: jax.Array, batch_axes: int) -> jax.Array:
    """A leaf as (batch, m, n): leading axes stack, the last is n, those between are m. A vector is one column."""
    batch = int(np.prod(x.shape[:batch_axes]))
    rest = x.shape[batch_axes:]
    return x.reshape(batch, -1, rest[-1]) if len(rest) >= 2 else x.reshape(batch, -1, 1)


def _largest_singular_value(x: jax.Array) -> jax.Array:
    """Of (batch, m, n) matrices the largest of all: twelve steps of power iteration from the longest row."""
    size = _size(x)
    scaled = times(x, 1 / jnp.where((size > 0) & jnp.isfinite(size), size, 1))
    longest = jnp.argmax(jnp.sum(jnp.square(jnp.abs(scaled)), axis=-1, keepdims=True), axis=-2, keepdims=True)
    v = _adjoint(jnp.take_along_axis(scaled, longest, axis=-2))

    def step(v, _):
        v = _dot(_adjoint(scaled), _dot(scaled, v))
        length = _size(v)
        return times(v, 1 / jnp.where(length > 0, length, 1)), None

    found = _size(_dot(scaled, lax.scan(step, v, None, length=12)[0])) * size
    return jnp.max(jnp.where(jnp.isfinite(size), found, size), initial=0)


def spectral_clip(
    max_singular_value: Threshold,
    *,
    method: Method = "hard",
    solver: Solver = "polar",
    batch_axes: Any = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Clips the singular values of each leaf: σ ← min(σ, β), or softly σ ← σ / √(1 + σ²/β²).

    Unlike a rescaling of the leaf it leaves the directions that are not too long as they are. It costs some 70 products
    of matrices a leaf: use it where a step is much more than that. In float32 the result is right to 10⁻⁴ β (measured:
    4·10⁻⁵) for matrices up to 1,000 β, whatever their singular values.

    Args:
      max_singular_value: β: a number, array (one a leaf, paths sorted), tracer, schedule or threshold. A threshold is
        given, and the metrics show as norm, an estimate of the largest singular value of each leaf (power iteration:
        at most that, and within some per cent of it).
      method: "hard" or "soft".
      solver: "polar": as above; "svd": by decomposition, as reference.
      batch_axes: how many leading axes of a leaf stack matrices (scanned layers), or a function of the path; None: 0.
        The last axis is one side of the matrices, all axes between are the other. Vectors are one column: their
        singular value is their norm.
      exclude: leaves to leave alone, as in `optaxclip.clip_by`.
      nonfinite: as in `optaxclip.clip_by`; a leaf is a block.

    Raises:
      ValueError: for a bad bound, or an unknown method or solver.

    Deviations: a matrix over 1,000 β (in Frobenius norm) is first scaled to that as a whole. The products are in
    float32 at least. Matrices must be whole on a device inside `shard_map`; under plain `jit` any sharding will do.

    References:
      Jiang, Semenov and Stich, `SPECTRA <https://arxiv.org/abs/2603.14315>`_, 2026; Amsel et al., `The Polar Express
      <https://arxiv.org/abs/2505.16932>`_, 2025, for polynomials that are best step by step

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.spectral_clip(1.0)
    >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, 0.5])), tx.init(jnp.zeros((2, 2))))
    >>> [round(float(u), 3) for u in jnp.diag(updates)]
    [1.0, 0.5]
    """
    threshold = as_threshold(max_singular_value, "spectral_clip", "max_singular_value")
    for argument, value, known in (("method", method, Method), ("solver", solver, Solver)):
        if value not in get_args(known):
            raise ValueError(f"spectral_clip: {argument} must be one of {get_args(known)}, got {value!r}.")

    def stacked(paths, arrays):
        stacks = [batch_axes(path) if callable(batch_axes) else batch_axes or 0 for path in paths]
        return [_matrices(widen(x), n) for x, n in zip(arrays, stacks, strict=True)]

    def one(x, matrices, bound):
        out = _clipped(matrices, bound.astype(matrices.real.dtype), method, solver)
        bad = jnp.nan if nonfinite == "propagate" else 0
        out = jnp.where(jnp.isfinite(_size(matrices)).all(), out, bad)
        return as_dtype_of(x, out.reshape(x.shape))

    def init_fn(params):
        leaves = measured_leaves(params, exclude)
        cut = leaf.cut(leaves.paths, [x.shape for x in leaves.arrays])
        norms = jnp.zeros(len(cut.names), accumulator(leaves.arrays))
        return ClipState(threshold.init(norms), fresh_metrics(norms, named_blocks(params, cut.names, leaf.named)))

    def update_fn(updates, state, params=None, **extra_args):
        leaves = measured_leaves(updates, exclude)
        cut, matrices = leaf.cut(leaves.paths, [x.shape for x in leaves.arrays]), stacked(leaves.paths, leaves.arrays)
        whole = Span((frozenset(),) * len(matrices), (), False)
        dtype = state.metrics.grad_norm.dtype
        norms = cut.gather([_largest_singular_value(m).astype(dtype) for m in matrices], MAX, whole)
        bounds, new = threshold.update(norms, state.threshold, params, **extra_args)
        bounds = jnp.maximum(jnp.asarray(bounds), 0)
        clipped = list(map(one, leaves.arrays, matrices, cut.spread(bounds, jnp.ones_like(bounds))))
        factors = jnp.where(norms > bounds, bounds / jnp.where(norms > 0, norms, 1), 1)
        metrics = recorded(state.metrics, Step(norms, bounds, factors, (norms > bounds).astype(dtype)))
        return leaves.rebuild(clipped), ClipState(hold_where_not_finite(norms, new, state.threshold), metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
