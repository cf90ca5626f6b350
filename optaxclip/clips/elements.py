"""Clipping each element between limits: it changes the gradient's direction and needs no norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from optaxclip import scopes, xla
from optaxclip.base import AxisNames, Exclude
from optaxclip.engine import Description, Rule, build
from optaxclip.norms import l1, linf
from optaxclip.record import Step
from optaxclip.thresholds.blocks import Fixed, new_threshold

# The lower and upper limits of the elements of a leaf: scalars, or arrays of its shape.
Limits = tuple[jax.Array, jax.Array]


def clip_elements(
    threshold: optax.GradientTransformationExtraArgs,
    *,
    measure: bool,
    exclude: Exclude,
    axis_names: AxisNames | None,
) -> optax.GradientTransformationExtraArgs:
    """Clips all elements between the limits that a threshold derives from the largest modulus.

    Measuring the modulus has a cost, so it is measured and recorded only if the threshold is not
    fixed or `measure` is True.

    Args:
      threshold: any threshold that returns `Limits` instead of a bound.
      measure: whether to record the largest modulus and the share of elements clipped.
      exclude, axis_names: as in `clip_by`.
    """
    measured = measure or not isinstance(threshold, Fixed)

    def act(leaves, layout, norm, limits):
        bound, each = _size(limits).astype(norm.dtype), [limits] * len(leaves.arrays)
        clipped = _clip_all(leaves.arrays, each)
        if not measured:
            return clipped, Step(None, bound, None, None, None)
        return clipped, _observe(leaves.arrays, each, layout, norm, bound)

    description = Description(scopes.tree, linf, threshold, exclude=exclude, kind="elements")
    return build(description, Rule(_largest if measured else None, act), axis_names)


def clip_each(
    *, measure: bool, exclude: Exclude, axis_names: AxisNames | None
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf between its own limits.

    They are passed to `update` as `limits=`, a list of `Limits`. Without `measure` only the number
    of steps is recorded, because finding the largest limit also has a cost.
    """

    def act(leaves, layout, norm, limits):
        clipped = _clip_all(leaves.arrays, limits)
        if not measure:
            return clipped, Step(None, None, None, None, None)
        # The largest limit overall, the same on all devices, like the norm.
        bound = xla.measure(linf, [_size(pair) for pair in limits], layout).astype(norm.dtype)
        return clipped, _observe(leaves.arrays, limits, layout, norm, bound)

    def given(norms, state, params=None, *, limits, **extra_args):
        return limits, state

    threshold = new_threshold(lambda norms: optax.EmptyState(), given, kind=Fixed)
    description = Description(scopes.tree, linf, threshold, exclude=exclude, kind="elements")
    return build(description, Rule(_largest if measure else None, act, bounded=measure), axis_names)


def _largest(leaves, layout) -> jax.Array:
    return xla.measure(linf, leaves.arrays, layout)


def _size(limits: Limits) -> jax.Array:
    """Returns the largest modulus within limits."""
    return jnp.maximum(jnp.abs(limits[0]), jnp.abs(limits[1]))


@functools.partial(jax.jit, inline=True)
def _clip_all(arrays: list[jax.Array], limits: list[Limits]) -> list[jax.Array]:
    """Clips real numbers to limits, and the modulus of complex ones to the upper. NaN stays NaN."""
    return [_clip(x, *pair) for x, pair in zip(arrays, limits, strict=True)]


def _clip(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    # In float32 at least: rounding a limit to the leaf's bfloat16 first may make it larger.
    wide = xla.widen(x)
    lower, upper = (limit.astype(wide.real.dtype) for limit in (lower, upper))
    if not jnp.iscomplexobj(x):
        return xla.as_dtype_of(x, jnp.clip(wide, lower, upper))
    over = jnp.abs(wide) > upper
    return jnp.where(over, xla.times(wide, upper / jnp.where(over, jnp.abs(wide), 1)), wide)


def _observe(arrays, limits: list[Limits], layout, norm: jax.Array, bound: jax.Array) -> Step:
    """Measures how much the largest element was shortened, and the share of elements clipped."""
    outside = [_outside(xla.widen(x), *pair) for x, pair in zip(arrays, limits, strict=True)]
    # Counted over all devices, like the sum; at least 1, for trees of empty leaves.
    count = jnp.maximum(jnp.asarray(xla.counts_of(layout, norm.dtype)), 1)
    share = xla.measure(l1, outside, layout).astype(norm.dtype) / count
    factor = jnp.where(norm > bound, bound / jnp.where(norm == 0, 1, norm), 1)
    return Step(norm, bound, factor, share, ~jnp.isfinite(norm))


def _outside(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Returns 1 for each element that limits change, else 0."""
    # Not `x != clipped`, which holds for a rounded bfloat16 result and for every NaN.
    size = jnp.abs(x) if jnp.iscomplexobj(x) else x
    lower, upper = (limit.astype(size.dtype) for limit in (lower, upper))
    return ((size > upper) | (size < lower)).astype(size.dtype)
