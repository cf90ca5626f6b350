"""Clipping the singular values of matrices: what a few bad examples inflate is a few singular directions."""

import math
from collections.abc import Callable
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import optax

from optaxclip.actions import rescale
from optaxclip.apply import Nonfinite, as_dtype_of
from optaxclip.core import ClipState, check_names, check_state
from optaxclip.leaves import Exclude, as_exclude, measured_leaves, one_vector
from optaxclip.mesh import Span
from optaxclip.norms import MAX, accumulator, widen
from optaxclip.record import Step, fresh_metrics, named_blocks, recorded
from optaxclip.scopes import leaf
from optaxclip.singular import FEWEST_STEPS, Method, Solver, clipped, largest_entry, largest_singular_value
from optaxclip.thresholds.combine import Threshold, as_threshold, hold_where_not_finite


def _matrices(path: str, x: jax.Array, batch_axes: int | Callable[[str], int] | None) -> jax.Array:
    """A leaf as (batch, m, n): leading axes stack, the last is n, those between are m. A vector is one column."""
    stack = (batch_axes(path) if callable(batch_axes) else batch_axes) or 0
    if not 0 <= stack <= x.ndim:
        raise ValueError(f"spectral_clip: batch_axes={stack}, but the leaf {path!r} has shape {x.shape}.")
    rest = x.shape[stack:] if x.ndim - stack >= 2 else (*x.shape[stack:], 1)
    return widen(x).reshape(math.prod(x.shape[:stack]), math.prod(rest[:-1]), rest[-1])


def spectral_clip(
    max_singular_value: Threshold,
    *,
    method: Method = "hard",
    solver: Solver = "polar",
    steps: int | None = None,
    batch_axes: int | Callable[[str], int] | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Clips the singular values of each leaf: σ ← min(σ, β), or softly σ ← σ / √(1 + σ²/β²).

    Unlike a rescaling of the leaf it leaves the directions that are not too long as they are. It costs some 100
    products of matrices a leaf: use it where a step is much more than that. In float32 the result is right to 10⁻⁴ β
    (measured: 8·10⁻⁵, with sides up to 512) for matrices up to 1,000 β, whatever their singular values, and to 10⁻⁷ ‖X‖
    (5·10⁻⁸) for larger ones, no better than numbers of that size themselves. In float64 it is right to 10⁻¹⁰ β.

    Args:
      max_singular_value: β: a number, array (one a leaf, paths sorted), tracer, schedule or threshold. A threshold is
        given, and the metrics show as norm, an estimate of the largest singular value of each leaf (power iteration:
        at most that, and within some per cent of it), of a stack the largest of all.
      method: "hard" or "soft".
      solver: "polar": as above; "svd": by decomposition, as reference (no derivative at equal singular values).
      steps: of the iteration for a polar factor, at least 5; None: 13, for float64 20. Each reaches four times as far,
        to matrices of 14 · 4^(steps - 5) β, and makes the error at σ ≈ β four times smaller, down to rounding.
      batch_axes: how many leading axes of a leaf stack matrices (scanned layers), or a function of the path; None: 0.
        The last axis is one side of the matrices, all axes between are the other. Vectors are one column: their
        singular value is their norm.
      exclude: leaves to leave alone, as in `optaxclip.clip_by`.
      nonfinite: as in `optaxclip.clip_by`; a leaf is a block.

    Raises:
      ValueError: for a bad bound, an unknown method, solver or `nonfinite`, or too few steps; at the update, if
        `batch_axes` does not fit a leaf, or if the threshold needs `params` and they are missing.

    Deviations: a matrix beyond the reach of `steps` (10⁶ β, in Frobenius norm) is first scaled down to it as a whole.
    The products are in float32 at least. Matrices must be whole on a device inside `shard_map`; under plain `jit` any
    sharding will do.

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
    exclude = as_exclude(exclude, "spectral_clip")
    for value, known in ((method, Method), (solver, Solver), (nonfinite, Nonfinite)):
        if value not in get_args(known):
            raise ValueError(f"spectral_clip: {value!r} is none of {get_args(known)}.")
    if steps is not None and steps < FEWEST_STEPS:
        raise ValueError(f"spectral_clip: steps must be at least {FEWEST_STEPS}, got {steps!r}.")

    def one(x, matrices, bound):
        count = steps or (20 if jnp.finfo(matrices.dtype).bits == 64 else 13)
        out = clipped(matrices, bound.astype(matrices.real.dtype), method, solver, count)
        bad = jnp.nan if nonfinite == "propagate" else 0
        return as_dtype_of(x, jnp.where(jnp.isfinite(largest_entry(matrices)).all(), out, bad).reshape(x.shape))

    def measured(tree):
        """The leaves, the same as matrices, how the tree is cut, and the norms."""
        leaves = measured_leaves(tree, exclude)
        cut = leaf.cut(leaves.paths, [x.shape for x in leaves.arrays])
        matrices = [_matrices(path, x, batch_axes) for path, x in zip(leaves.paths, leaves.arrays, strict=True)]
        dtype, whole = accumulator(leaves.arrays), Span((frozenset(),) * len(matrices), (), False)
        norms = cut.gather(one_vector([largest_singular_value(m).astype(dtype) for m in matrices]), MAX, whole)
        return leaves, matrices, cut, norms

    def init_fn(params):
        leaves = measured_leaves(params, exclude)
        cut = leaf.cut(leaves.paths, [x.shape for x in leaves.arrays])
        norms = jnp.zeros(len(cut.names), accumulator(leaves.arrays))
        return ClipState(threshold.init(norms), fresh_metrics(norms, named_blocks(params, cut.names, leaf.named)))

    def update_fn(updates, state, params=None, **extra_args):
        state = init_fn(updates) if state is None else state
        check_state(state)
        leaves, matrices, cut, norms = measured(updates)
        check_names(cut.names, state.metrics.blocks)
        norms = norms.astype(state.metrics.grad_norm.dtype)

        def param_norms() -> Any:
            if params is None:
                raise ValueError("spectral_clip: this threshold needs params: write tx.update(grads, state, params).")
            return measured(params)[-1]

        bounds, new = threshold.update(norms, state.threshold, cast(Any, param_norms), **extra_args)
        bounds = jnp.maximum(jnp.asarray(bounds).astype(norms.dtype), 0)
        new_leaves = list(map(one, leaves.arrays, matrices, cut.spread(bounds, jnp.ones_like(bounds))))
        step = Step(norms, bounds, rescale(norms, bounds), (norms > bounds).astype(norms.dtype))
        return leaves.rebuild(new_leaves), ClipState(
            hold_where_not_finite(norms, new, state.threshold), recorded(state.metrics, step)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
