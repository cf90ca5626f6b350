"""QK-Clip: attention's query and key weights are scaled down where their logits grew too large."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.thresholds.learned import like


@validate.named
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

    γ = min(1, τ / S) for the largest logit S of a head; queries are multiplied by γᵅ, keys by γ¹⁻ᵅ.
    A function of parameters, for use after the optimizer's step; not a gradient transformation.

    In grouped-query attention consecutive query heads share a key head, which is multiplied by the
    smallest γ¹⁻ᵅ of its group, and each query by what is left of its own γ: every head's logits are
    scaled by its own γ, and those of a head that is within τ stay as they are.

    Args:
      query, key: the weights of the projections, arrays or trees of them (kernel and bias), each
        with an axis of heads: Flax's are (features, heads, size) and (heads, size). The heads of
        `query` may be a multiple of those of `key`.
      max_logits: for each query head the largest logit (before the softmax, scaled) of the batch,
        over all examples and positions, and over all devices.
      threshold: τ.
      alpha: α, the share of the queries; 1.0 leaves the keys alone (their axis of heads may then be
        any).
      head_axis: which axis numbers the heads.

    Returns:
      The new query and key weights, in their dtypes.

    Raises:
      ValueError: for an α outside [0, 1], a negative threshold, or an axis that does not number
      heads.

    Deviations: a head whose logit is NaN or infinite is left alone: that says nothing of by how
    much to scale it. Megatron-LM scales all heads of a group by the smallest γ of them.

    References:
      Kimi Team, `Kimi K2: Open Agentic Intelligence <https://arxiv.org/abs/2507.20534>`_, 2025

    >>> import jax.numpy as jnp, optaxclip
    >>> query, key = jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1))
    >>> query, key = optaxclip.clip_qk(query, key, jnp.array([400.0, 50.0]))
    >>> query.ravel(), key.ravel()
    (Array([0.5, 1. ], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """
    validate.between(0, 1, alpha=alpha)
    validate.nonnegative(threshold=threshold)
    # By the logits, not by the norm of the weights, which many copies clip: a large norm alone does
    # not make large logits.
    gamma = _scales(xla.widen(jnp.asarray(max_logits)), threshold)
    if validate.is_static(alpha) and alpha == 1:
        return jax.tree.map(lambda x: _scale(x, gamma, head_axis), query), key
    # Of kernels and biases alike; only heads that all leaves agree on can be told apart.
    heads = {x.shape[head_axis] for x in jax.tree.leaves(key) if -x.ndim <= head_axis < x.ndim}
    groups = heads.pop() if len(heads) == 1 else 0
    if not groups or gamma.shape[0] % groups:
        # As if no key were shared, which `_scale` refuses for a key that has other heads.
        groups = gamma.shape[0]
    rest = gamma ** (1 - like(alpha, gamma))
    shared = jnp.min(rest.reshape(groups, -1), axis=1)
    theirs = jnp.repeat(shared, gamma.shape[0] // groups)
    # Exactly 1 for the head that sets the factor of the key, as it is wherever no key is shared.
    left = jnp.where(theirs == rest, 1, rest / jnp.where(theirs > 0, theirs, 1))
    own = gamma ** like(alpha, gamma) * left
    new_query = jax.tree.map(lambda x: _scale(x, own, head_axis), query)
    return new_query, jax.tree.map(lambda x: _scale(x, shared, head_axis), key)


def _scales(largest: jax.Array, threshold: ArrayLike) -> jax.Array:
    """γ for each head."""
    bound = like(threshold, largest)
    over = jnp.isfinite(largest) & (largest > bound)
    return jnp.where(over, bound / jnp.where(over, largest, 1), 1)


def _scale(x: jax.Array, factors: jax.Array, axis: int) -> jax.Array:
    """Weights times one factor per head."""
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != factors.shape[0]:
        raise ValueError(
            f"{validate.called()}: axis {axis} of weights of shape {x.shape} must number"
            f" {factors.shape[0]} heads: max_logits has one entry per query head, and there are a"
            " whole number of query heads per key head. Or pass head_axis=."
        )
    shape = [1] * x.ndim
    shape[axis] = -1
    return xla.as_dtype_of(x, xla.times(xla.widen(x), factors.reshape(shape)))
