"""QK-Clip: attention's query and key weights are scaled down where their logits grew too large."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip.apply import as_dtype_of
from optaxclip.norms import widen
from optaxclip.thresholds.learned import number


def clip_qk(
    query: Any,
    key: Any,
    max_logits: jax.Array,
    threshold: ArrayLike = 100.0,
    *,
    alpha: ArrayLike = 0.5,
    head_axis: int = -2,
) -> tuple[Any, Any]:
    """Scales each head's query and key weights so that its largest logit would have been τ at most.

    γ = min(1, τ / S) for the largest logit S of a head; queries are multiplied by γᵅ, keys by γ¹⁻ᵅ. A function of
    parameters, for use after the optimizer's step; not a gradient transformation.

    Args:
      query, key: the weights of the projections, arrays or trees of them (kernel and bias), each with an axis of heads:
        Flax's are (features, heads, size) and (heads, size).
      max_logits: for each head the largest logit (before the softmax, scaled) of the batch, over all examples and
        positions, and over all devices.
      threshold: τ.
      alpha: α, the share of the queries; 1.0 leaves the keys alone, for keys that heads share (their axis of heads may
        then be any).
      head_axis: which axis numbers the heads.

    Returns:
      The new query and key weights, in their dtypes.

    Raises:
      ValueError: for an α outside [0, 1], a negative threshold, or an axis that does not have a length of `max_logits`.

    Deviations: a head whose logit is NaN or infinite is left alone: that says nothing of by how much to scale it.

    References:
      Kimi Team, `Kimi K2: Open Agentic Intelligence <https://arxiv.org/abs/2507.20534>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> query, key = optaxclip.clip_qk(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.array([400.0, 50.0]))
    >>> query.ravel(), key.ravel()
    (Array([0.5, 1. ], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """
    alpha = number(alpha, "clip_qk", "alpha", 0.0, 1.0 + 1e-9)
    threshold = number(threshold, "clip_qk", "threshold", 0.0)
    largest = widen(max_logits)
    over = jnp.isfinite(largest) & (largest > jnp.asarray(threshold).astype(largest.dtype))
    gamma = jnp.where(over, jnp.asarray(threshold).astype(largest.dtype) / jnp.where(over, largest, 1), 1)
    share = jnp.asarray(alpha).astype(gamma.dtype)

    def scaled(x, factor):
        if x.ndim < abs(head_axis) or x.shape[head_axis] != factor.shape[0]:
            raise ValueError(
                f"clip_qk: axis {head_axis} of weights of shape {x.shape} must number the {factor.shape[0]} heads of"
                " max_logits: pass head_axis=."
            )
        shape = [1] * x.ndim
        shape[head_axis] = -1
        return as_dtype_of(x, widen(x) * factor.reshape(shape).astype(widen(x).dtype))

    shared = isinstance(alpha, float | int) and alpha == 1
    new_key = key if shared else jax.tree.map(lambda x: scaled(x, gamma ** (1 - share)), key)
    return jax.tree.map(lambda x: scaled(x, gamma**share), query), new_key
