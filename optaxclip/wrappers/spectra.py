"""SPECTRA: clips the updates of an optimizer by singular value."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import scopes, trees, validate
from optaxclip.base import Exclude, Scope, Stacked, Threshold
from optaxclip.clips.matrices import as_cuts, find_forms
from optaxclip.clips.singular import Method
from optaxclip.clips.spectral_clip import spectral_clip
from optaxclip.engine import chain, lay_out


@validate.named
def spectra(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    max_singular_value: Threshold = 10.0,
    *,
    warmup_steps: int = 0,
    weight_decay: float | jax.Array = 0.1,
    mask: Any = None,
    method: Method = "soft",
    exclude: Exclude = None,
    axis_names: tuple[()] | None = None,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPECTRA: w ← (1 - λη)·w - αη·H(u), u the update of an optimizer, H a spectral clip at c.

    By default the clip is soft: σ ← σ / √(1 + σ²/c²). α = √max(1, n/m) for a kernel that maps m
    features to n, and 1 for a vector.

    Args:
      inner: the transformation of gradients into u, without learning rate and weight decay, such as
        `optax.scale_by_adam()` or `optax.contrib.scale_by_ademamix()`.
      learning_rate: η, a number or a schedule.
      max_singular_value: c, a number or schedule; without warm-up anything that `spectral_clip`
        takes. The authors use 5 and 10; in some runs c falls to 0 with the learning rate, which you
        can write as a schedule.
      warmup_steps: T, the steps over which the learning rate rises. During these c is larger, so
        that c·η is already what it will be at T: cₜ = c·η_T/ηₜ. Early updates, which the small rate
        makes harmless, are therefore hardly clipped.
      weight_decay, mask: λ, and which leaves decay, as in `optax.add_decayed_weights`.
      method, exclude, axis_names, stacked: as in `spectral_clip`.

    Raises:
      ValueError: for a bad `inner`, number, method or `stacked`; with a warm-up, for a rate that is
        not a schedule, or a bound that is neither a number nor a schedule.

    Deviations: vectors are clipped softly like matrices (the authors' code leaves vectors up to c
    alone). m and n are read from a kernel in Flax's layout, with n last; for an embedding of shape
    (vocabulary, features) the authors' code takes the vocabulary for n.

    References:
      Jiang, Semenov and Stich, `SPECTRA <https://arxiv.org/abs/2603.14315>`_, 2026, and its `code
      <https://github.com/mlolab/llm-spectral-clipping>`_

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optaxclip.wrappers.spectra(optax.identity(), 1.0, 3.0, weight_decay=0.0)
    >>> params = jnp.zeros((2, 2))
    >>> updates, _ = tx.update(jnp.diag(jnp.array([4.0, 0.0])), tx.init(params), params)
    >>> round(float(updates[0, 0]), 3)  # 4 / √(1 + 16/9)
    -2.4
    """
    inner = validate.as_optimizer(inner)
    validate.steps(warmup_steps=warmup_steps)
    validate.nonnegative(weight_decay=weight_decay)
    bound = max_singular_value
    if warmup_steps:
        bound = _hold_product(bound, learning_rate, warmup_steps)
    form = {"method": method, "exclude": exclude, "axis_names": axis_names, "stacked": stacked}
    return chain(
        inner,
        # Before decay and rate, because the decay is not clipped, and c is in units of u.
        spectral_clip(bound, **form),
        # After the clip, which would otherwise clip α as well.
        _scale_by_shape(scopes.leaf if stacked is None else scopes.stacked(stacked), exclude),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _hold_product(bound: Any, rate: optax.ScalarOrSchedule, steps: int) -> optax.Schedule:
    """Makes a bound whose product with the rate is constant during the warm-up."""
    # A rate from `optax.inject_hyperparams` is a number, which the bound would silently not follow.
    if not callable(rate):
        raise validate.fail("learning_rate must be a schedule if there are warmup_steps", rate)
    # Refuses thresholds and bounds by leaf, which are containers.
    if not jax.tree_util.all_leaves([bound]):
        must = "max_singular_value must be a number or a schedule if there are warmup_steps"
        raise validate.fail(must, bound)

    def at(step: Any) -> jax.Array:
        peak, now = jnp.asarray(rate(steps)), jnp.asarray(rate(step))
        # Warm-ups begin at a rate of 0, which would make the bound infinite or NaN.
        factor = jnp.where(step < steps, peak / jnp.maximum(now, 1e-10 * peak), 1)
        return factor * (bound(step) if callable(bound) else bound)

    return at


def _scale_by_shape(scope: Scope, exclude: Exclude) -> optax.GradientTransformation:
    """Multiplies each kernel by √max(1, n/m), where it maps m features to n."""

    def factor(shape: tuple[int, int]) -> float:
        m, n = shape
        return math.sqrt(max(1.0, n / max(m, 1)))

    def update(updates, _):
        leaves = trees.select(updates, exclude)
        layout = lay_out(scope, leaves.paths, leaves.shapes)
        forms = find_forms(leaves, layout, as_cuts(None))
        each = zip(leaves.arrays, forms, strict=True)
        return leaves.rebuild([x * factor(form.sides(form.shape)) for x, form in each])

    return optax.stateless(update)
