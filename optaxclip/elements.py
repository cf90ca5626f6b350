"""Clipping each element between limits: what changes the direction of a gradient, and needs no norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.apply import as_dtype_of
from optaxclip.core import ClipState, check_state
from optaxclip.leaves import Exclude, measured_leaves, one_vector
from optaxclip.measure import measure
from optaxclip.mesh import AxisNames, find_span
from optaxclip.norms import MAX, SUM, accumulator, linf, times, widen
from optaxclip.record import Step, fresh_metrics, recorded
from optaxclip.scopes import tree


class Limits(NamedTuple):
    """Where the limits come from.

    Attributes:
      init: `(norm, params) -> state`, the norm a zero of its dtype.
      update: `(norm, state, updates, params, **extra_args) -> (limits, state)`. The norm is the largest modulus of all
        updates; the limits are a pair, lower and upper, for each measured leaf: scalars or arrays of the leaf's shape.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[list[tuple[jax.Array, jax.Array]], Any]]


def between(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Real numbers into [lower, upper]; complex ones to a modulus of at most `upper`, phase kept. NaN stays NaN."""
    wide = widen(x)
    lower, upper = lower.astype(wide.real.dtype), upper.astype(wide.real.dtype)
    if not jnp.iscomplexobj(x):
        return as_dtype_of(x, jnp.clip(wide, lower, upper))
    over = jnp.abs(wide) > upper
    return jnp.where(over, times(wide, upper / jnp.where(over, jnp.abs(wide), 1)), wide)


def _outside(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """How many elements the limits change."""
    size = jnp.abs(x) if jnp.iscomplexobj(x) else x
    return jnp.sum((size > upper) | (size < lower), dtype=upper.dtype)


def _widest(limits, cut, span) -> jax.Array:
    """The largest modulus that any element may have, on any device."""
    if len({id(upper) for _, upper in limits}) == 1:  # the same limits for all leaves: nothing to pool
        limits, cut = limits[:1], None
    each = [jnp.max(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), initial=0) for lower, upper in limits]
    return each[0] if cut is None else cut.gather(one_vector(each), MAX, span)


def clip_elements(
    limits: Limits, exclude: Exclude = None, axis_names: AxisNames | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips each element between limits. NaN stays NaN, infinity becomes a limit; the record has one entry."""

    def init_fn(params):
        norm = jnp.zeros((), accumulator(measured_leaves(params, exclude).arrays))
        return ClipState(limits.init(norm, params), fresh_metrics(norm, {}))

    def update_fn(updates, state, params=None, **extra_args):
        state = init_fn(updates) if state is None else state
        check_state(state)
        leaves = measured_leaves(updates, exclude)
        cut = tree.cut(leaves.paths, [x.shape for x in leaves.arrays])
        span = find_span(leaves.arrays, leaves.paths, axis_names)
        norm = measure(linf, leaves.arrays, cut, span).norms.astype(state.metrics.grad_norm.dtype)
        each, new = limits.update(norm, state.threshold, updates, params, **extra_args)
        outside = [_outside(widen(x), *pair).astype(norm.dtype) for x, pair in zip(leaves.arrays, each, strict=True)]
        count = cut.count([span.size(i) for i in range(len(leaves.arrays))])
        bound = _widest(each, cut, span).astype(norm.dtype)
        factor = jnp.where(norm > bound, bound / jnp.where(norm == 0, 1, norm), 1)
        share = cut.gather(one_vector(outside), SUM, span) / max(float(count), 1.0)
        clipped = [between(x, *pair) for x, pair in zip(leaves.arrays, each, strict=True)]
        return leaves.rebuild(clipped), ClipState(new, recorded(state.metrics, Step(norm, bound, factor, share)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
