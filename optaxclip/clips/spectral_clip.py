"""Clipping the singular values of matrices: bad examples inflate a few singular directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from optaxclip import scopes, validate, xla
from optaxclip.actions import rescale
from optaxclip.base import Exclude, Nonfinite, Norms, Stacked, Threshold
from optaxclip.clips import singular
from optaxclip.clips.bounds import bound_leaves
from optaxclip.clips.matrices import as_cuts, find_forms, names_of
from optaxclip.clips.singular import FEWEST_STEPS, Method, Solver
from optaxclip.core import decide, factor_of_bad
from optaxclip.engine import Description, Rule, build
from optaxclip.trees import Leaves


@validate.named
def spectral_clip(
    max_singular_value: Threshold,
    *,
    method: Method = "hard",
    solver: Solver = "polar",
    steps: int | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: tuple[()] | None = None,
    stacked: Stacked | None = None,
    specs: PartitionSpec | Callable[[str], PartitionSpec] | Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the singular values of each leaf: σ ← min(σ, β), or softly σ ← σ / √(1 + σ²/β²).

    Unlike rescaling the leaf, it does not change the directions that are short enough. It costs 120
    matrix products per leaf, 65 if soft, so use it only if a step costs much more than that. In
    float32 the result is accurate to 10⁻⁴ β (measured: 8·10⁻⁵, with sides up to 512) for matrices
    up to 1,000 β, whatever their singular values, and to 10⁻⁷ ‖X‖ (5·10⁻⁸) for larger ones, which
    is the precision of numbers of that size. In float64 it is accurate to 10⁻¹⁰ β up to 10⁵ β, and
    to 2·10⁻¹⁶ ‖X‖ beyond. Derivatives are only accurate to 10⁻³ (measured: 8·10⁻⁴), because the
    slope of the iteration converges much later than its value.

    Args:
      max_singular_value: β: a number, tracer, schedule or threshold, or one for each leaf, as in
        `clip_by_leaf_norm`. The norm that thresholds get and metrics show is an estimate of the
        largest singular value of each matrix by power iteration. It is at most the true value; for
        200 random matrices it was at least 0.87 of it, and mostly over 0.98.
        `thresholds.running(2.0)` and `thresholds.percentile(95.0)` follow it, as in Yukhimchuk et
        al.
      method: "hard" or "soft".
      solver: "polar": matrix products, as above; "svd": a decomposition, for reference (it has no
        derivative at equal singular values).
      steps: the steps of the iteration for a polar factor, at least 5. None means 13, or 20 for
        float64. Each step reaches matrices four times as large, up to 14 · 4^(steps - 5) β, and
        makes the error at σ ≈ β at least four times smaller, down to rounding.
      exclude: leaves to leave alone, as in `optaxclip.clip_by`.
      nonfinite: as in `optaxclip.clip_by`; each matrix is a block.
      axis_names: only () is allowed. It says that matrices are whole on each device, for a
        `shard_map` or `pmap` that cannot know this, or whose types say that they vary. None goes by
        the types.
      stacked: which leaves stack layers, as in `clip_by_leaf_norm`. Each layer is a matrix with its
        own bound. The last of the remaining axes is one side of the matrix, and all others together
        are the other side. A vector is one column, whose singular value is its norm.
      specs: inside `shard_map`, how leaves are cut: a `PartitionSpec`, a function of the path, or a
        tree like the updates, as in `in_specs`. Each device gathers a matrix, clips all of it, and
        keeps its own part. Leave it out under plain `jit`, where any sharding works and XLA divides
        the work.

    Raises:
      ValueError: for a bad bound, an unknown method, solver or `nonfinite`, or too few steps; for
        a `stacked` that `scopes.stacked` rejects; at the update, if the threshold needs `params`
        and they are missing, or if a matrix is spread over devices inside `shard_map` without
        `specs`.

    Deviations: a matrix whose Frobenius norm is beyond the reach of `steps` (10⁶ β) is first scaled
    down to that reach as a whole. The products are computed in at least float32.

    References:
      Yukhimchuk et al., `Gradient Clipping Beyond Vector Norms
      <https://arxiv.org/abs/2605.11838>`_, 2026; Jiang, Semenov and Stich, `SPECTRA
      <https://arxiv.org/abs/2603.14315>`_, 2026, for the soft clip; Amsel et al.,
      `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025, for polynomials that are
      optimal step by step

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.spectral_clip(1.0)
    >>> updates, _ = tx.update(jnp.diag(jnp.array([3.0, 0.5])), tx.init(jnp.zeros((2, 2))))
    >>> [round(float(u), 3) for u in jnp.diag(updates)]
    [1.0, 0.5]
    """
    threshold = bound_leaves(exclude, max_singular_value=max_singular_value)
    validate.choice(get_args(Method), method=method)
    validate.choice(get_args(Solver), solver=solver)
    _check_arguments(steps, axis_names)
    cuts = as_cuts(specs)
    # All of the matrix becomes NaN or 0, because a matrix with one NaN has no singular values.
    bad = factor_of_bad(nonfinite)

    def matrices(leaves: Leaves, layout: xla.Layout) -> list[jax.Array]:
        forms = find_forms(leaves, layout, cuts)
        return [form.read(x) for form, x in zip(forms, leaves.arrays, strict=True)]

    def measure(leaves: Leaves, layout: xla.Layout) -> Norms:
        if specs is None:
            _check_whole(leaves, layout.span)
        found = map(singular.largest_singular_values, matrices(leaves, layout))
        norms = [norm.astype(xla.accumulator(leaves.arrays)) for norm in found]
        # All devices hold the same matrices, but by type their norms may vary over devices.
        return layout.span.pool(jnp.concatenate(norms) if norms else jnp.zeros(0), "max")

    def act(leaves: Leaves, layout: xla.Layout, norms: Norms, bounds: Norms):
        # The factors are only recorded: one factor would shorten all singular values of a matrix.
        step = decide(norms, bounds, rescale, bad)
        each = zip(matrices(leaves, layout), xla.spread(step.bounds, layout), strict=True)
        clipped = [clip_stack(*leaf) for leaf in each]
        back = zip(find_forms(leaves, layout, cuts), clipped, leaves.arrays, strict=True)
        return [form.write(*leaf) for form, *leaf in back], step

    def clip_stack(matrices: jax.Array, bounds: jax.Array) -> jax.Array:
        # 13 steps reach 14 · 4⁸ β, about 10⁶ β, where float32 rounds to 0.06 β; 20 steps reach
        # 10¹⁰ β.
        count = steps or (20 if jnp.finfo(matrices.dtype).bits == 64 else 13)
        bounds = bounds.reshape(-1, 1, 1).astype(matrices.real.dtype)
        out = singular.clip_matrices(matrices, bounds, method, solver, count)
        fine = jnp.isfinite(singular.largest_entry(matrices))
        return jnp.where(fine, out, 0) if bad == 0 else xla.poison(fine, out)

    scope = scopes.leaf if stacked is None else scopes.stacked(stacked)
    description = Description(scope, None, threshold, exclude=exclude, kind="other")

    def cut_over(path: str) -> tuple[str, ...]:
        names = names_of(cuts(path))
        xla.check_axes(names, "specs=")
        return names

    # With specs the types are not needed, and `shard_map` may not keep any.
    spread = axis_names if specs is None else cut_over
    return build(description, Rule(measure, act), spread)


def _check_arguments(steps, axis_names) -> None:
    if steps is not None:
        validate.size(steps=steps)
        validate.at_least(FEWEST_STEPS, steps=steps)
    if axis_names not in (None, ()):
        must = "axis_names must be () or None: () says that each device holds whole matrices"
        raise validate.fail(must, axis_names)


def _check_whole(leaves: Leaves, span: xla.Span) -> None:
    """Raises if a matrix may be spread over devices, each of which would clip its own part."""
    # Under plain `jit` arrays are whole, whatever their sharding. They are parts only inside a
    # `shard_map` over more than one device.
    spread = [path for i, path in enumerate(leaves.paths) if span.parts(i) > 1]
    if spread and not span.explicit:
        call = validate.called()
        raise ValueError(
            f"{call}: singular values need whole matrices, but inside shard_map these leaves"
            f" vary over the mesh axes {span.axes}: {spread}. Say how they are cut, as in"
            f" in_specs: {call}(..., specs=...), or clip outside of shard_map, where any sharding"
            f" works. If every device holds the same whole matrices, as after psum or pmean, write"
            f" {call}(..., axis_names=())."
        )
