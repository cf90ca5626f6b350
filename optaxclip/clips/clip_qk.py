"""QK-Clip: attention's query and key weights are scaled down where their logits grew too large."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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
    content_size: int | None = None,
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
      content_size: for multi-head latent attention, how many numbers of each head, first along the
        axis behind that of the heads, are content. What follows in `query` is its rotary part,
        whose key all heads share, so that it takes all of γ; what follows in `key` is the value,
        and stays. The kernels are those that lead out of the latents: (rank, heads, content +
        rotary) and (rank, heads, content + value). The shared rotary key is not passed.

    Returns:
      The new query and key weights, in their dtypes.

    Raises:
      ValueError: for an α outside [0, 1], a negative threshold, an axis that does not number heads,
        or a `content_size` that is not within a head.

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
    own, shared = _share_out(gamma, like(alpha, gamma), _count_heads(key, head_axis))
    new_query = jax.tree.map(lambda x: _scale(x, own, head_axis, content_size, gamma), query)
    return new_query, jax.tree.map(lambda x: _scale(x, shared, head_axis, content_size), key)


def _count_heads(key: Any, axis: int) -> int:
    """How many heads keys have; 0 if their leaves do not agree."""
    # Of kernels and biases alike; only heads that all leaves agree on can be told apart.
    heads = {x.shape[axis] for x in jax.tree.leaves(key) if -x.ndim <= axis < x.ndim}
    return heads.pop() if len(heads) == 1 else 0


def _share_out(gamma: jax.Array, alpha: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """The factors of the query heads, and of the key heads that groups of them share."""
    if not groups or gamma.shape[0] % groups:
        # As if no key were shared, which `_scale` refuses for a key that has other heads.
        groups = gamma.shape[0]
    rest = gamma ** (1 - alpha)
    shared = jnp.min(rest.reshape(groups, -1), axis=1)
    theirs = jnp.repeat(shared, gamma.shape[0] // groups)
    # Exactly 1 for the head that sets the factor of the key, as it is wherever no key is shared.
    left = jnp.where(theirs == rest, 1, rest / jnp.where(theirs > 0, theirs, 1))
    return gamma**alpha * left, shared


def _scales(largest: jax.Array, threshold: ArrayLike) -> jax.Array:
    """γ for each head."""
    bound = like(threshold, largest)
    over = jnp.isfinite(largest) & (largest > bound)
    return jnp.where(over, bound / jnp.where(over, largest, 1), 1)


def _scale(
    x: jax.Array,
    factors: jax.Array,
    axis: int,
    content_size: int | None = None,
    others: ArrayLike = 1.0,
) -> jax.Array:
    """Weights times one factor per head; what follows its content, times another."""
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != factors.shape[0]:
        raise ValueError(
            f"{validate.called()}: axis {axis} of weights of shape {x.shape} must number"
            f" {factors.shape[0]} heads: max_logits has one entry per query head, and there are a"
            " whole number of query heads per key head. Or pass head_axis=."
        )
    shape, axis = [1] * x.ndim, axis % x.ndim
    shape[axis] = -1
    factors = factors.reshape(shape)
    if content_size is not None:
        most = (*x.shape, 0)[axis + 1]
        if content_size not in range(1, most + 1):
            must = f"content_size must be a whole number from 1 to {most}, the size of a head"
            raise validate.fail(must, content_size)
        place = lax.broadcasted_iota(jnp.int32, x.shape, axis + 1)
        factors = jnp.where(place < content_size, factors, jnp.reshape(others, shape))
    return xla.as_dtype_of(x, xla.times(xla.widen(x), factors))
