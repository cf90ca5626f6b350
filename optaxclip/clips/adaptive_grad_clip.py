"""Adaptive gradient clipping (AGC), the clip of normaliser-free networks, and its two helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, thresholds, validate, xla
from optaxclip.actions import rescale
from optaxclip.base import AxisNames, Exclude, Nonfinite, Norm, Threshold
from optaxclip.core import clip_by
from optaxclip.norms import l2
from optaxclip.thresholds.convert import as_threshold


@validate.named
def adaptive_grad_clip(
    clipping: Threshold,
    eps: ArrayLike = 1e-3,
    axis: Any = None,
    *,
    # None, not 0: `optax.inject_hyperparams` would make an array of a number.
    batch_axes: int | Callable[[str], int] | None = None,
    norm: Norm | float = l2,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each unit to a share of its parameters' norm: ‖gᵢ‖ ≤ clipping · max(‖wᵢ‖, eps).

    A unit is the part of a leaf that feeds one output: a column of a dense kernel, a filter of a
    convolution. `update` needs `params`.

    Args:
      clipping: the largest ratio of a unit's norm to that of its parameters: a number or a
        schedule; 0.01 in the paper, less for large batches. DreamerV3 clips whole leaves
        (`axis=...`) at 0.3.
      eps: a lower limit on the norm of the parameters, which lets a unit of zeros move (at first by
        clipping · eps).
      axis: the axes that a unit spans: None for Optax's convention by rank (kernels in the layouts
        IO, HWIO, DHWIO), an axis or a tuple, `...` for whole leaves, or a function of the path.
        A vector is one unit, except with `()`, which makes each element a unit.
      batch_axes: how many leading axes number stacked layers (`nn.scan`), or a function of the
        path.
      norm: a norm other than the Euclidean one.
      exclude: leaves to leave alone, as in `optaxclip.clip_by`. The paper excludes the last,
        linear, layer: `exclude="^head/"`.
      nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for an argument that is negative, NaN, a boolean or a string; at the update, if
        `params` is missing, if axes do not fit a leaf, or if its rank has no convention.

    Deviations from `optax.adaptive_grad_clip`: norms are in float32 at least, and results in the
    gradient's dtype (Optax promotes to the parameters'); there is no `div_eps` of 1e-6, which clips
    tiny gradients too much; an `axis` for kernels does not fail on biases. As in Optax's code (not
    its docstring), a unit of a rank-3 kernel spans axis 0.

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without Normalization
      <https://arxiv.org/abs/2102.06171>`_, 2021

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.adaptive_grad_clip(0.1)
    >>> params, grads = jnp.ones((4, 2)), jnp.array([[1.0, 0.0]] * 4)
    >>> tx.update(grads, tx.init(params), params)[0][0]
    Array([0.1, 0. ], dtype=float32)
    """
    validate.nonnegative(eps=eps)
    return clip_by(
        # A floor under ‖w‖ but not under ‖g‖, where Optax's 1e-6 makes a tiny gradient that is
        # over its bound shorter than the bound.
        thresholds.param_relative(as_threshold(clipping=clipping), eps),
        # If layers are stacked along axis 0, Optax's rule by rank mixes their norms without an
        # error.
        scope=scopes.units(axis, batch_axes=batch_axes),
        norm=norm,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )


@validate.named
def unitwise_norm(x: ArrayLike, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Computes the Euclidean norm of each unit of an array, in the shape of the array.

    Args:
      x: an array.
      axis: the axes that a unit spans; None: by rank, see `adaptive_grad_clip`.

    Returns:
      An array of the shape of `x` in which each element is the norm of its unit, in float32 at
      least.

    >>> import jax.numpy as jnp, optaxclip
    >>> optaxclip.unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]))
    Array([[5., 2.],
           [5., 2.]], dtype=float32)
    """
    x = jnp.asarray(x)
    blocks = scopes.units(axis).cut(["x"], [x.shape])
    layout = xla.lay_out(blocks, ["x"], [x.shape])
    (norms,) = xla.spread(xla.measure(l2, [x], layout), layout)
    # The shape of the array, as in Optax: `unitwise_clip` requires it.
    return jnp.broadcast_to(norms, x.shape)


@validate.named
def unitwise_clip(
    g_norm: ArrayLike,
    max_norm: ArrayLike,
    grad: ArrayLike,
    div_eps: ArrayLike = 1e-6,
) -> jax.Array:
    """Scales `grad` by max_norm / max(g_norm, div_eps) where `g_norm` is over `max_norm`.

    The three arrays have the same shape.

    Raises:
      ValueError: if they do not.

    >>> import jax.numpy as jnp, optaxclip
    >>> norms = jnp.array([5.0, 0.5])
    >>> optaxclip.unitwise_clip(norms, jnp.array([1.0, 1.0]), grad=norms)
    Array([1. , 0.5], dtype=float32)
    """
    g_norm, max_norm, grad = map(jnp.asarray, (g_norm, max_norm, grad))
    if not g_norm.shape == max_norm.shape == grad.shape:
        shapes = f"{g_norm.shape}, {max_norm.shape} and {grad.shape}"
        raise ValueError(
            f"unitwise_clip: g_norm, max_norm and grad must have the same shape, got {shapes}."
        )
    dtype = jnp.promote_types(g_norm.dtype, jnp.float32)
    norms = jnp.maximum(g_norm.astype(dtype), jnp.asarray(div_eps, dtype))
    # Compared without `div_eps`: below it, max_norm / div_eps would shorten units within the bound.
    factor = jnp.where(g_norm <= max_norm, 1, rescale(norms, max_norm.astype(dtype)))
    return (grad * factor.astype(grad.dtype)).astype(grad.dtype)
