"""QK-Clip: scales down query and key weights of attention heads whose logits grew too large."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optaxclip import validate, xla


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
    """Scales each head's query and key weights so that its largest logit would have been at most τ.

    γ = min(1, τ / S) for the largest logit S of a head; queries are multiplied by γᵅ, keys by γ¹⁻ᵅ.
    This is a function of parameters to call after the optimizer's step, not a gradient
    transformation.

    In grouped-query attention consecutive query heads share a key head. The key head is multiplied
    by the smallest γ¹⁻ᵅ of its group, and each query head by the rest of its own γ. The logits of
    every head are thus scaled by its own γ, and those of a head within τ do not change.

    Args:
      query, key: the weights of the projections: arrays, or trees of arrays (kernel and bias), each
        with an axis of heads. In Flax their shapes are (features, heads, size) and (heads, size).
        The number of heads of `query` may be a multiple of that of `key`.
      max_logits: the largest logit of each query head (scaled, before the softmax) in the batch,
        over all examples, positions and devices.
      threshold: τ.
      alpha: α, the share of γ that queries take; 1.0 leaves the keys alone (their heads may then be
        on any axis).
      head_axis: the axis of heads.
      content_size: for multi-head latent attention, how many entries of each head are content. They
        come first along the axis after `head_axis`. The rest of `query` is its rotary part, which
        takes all of γ because all heads share its key; the rest of `key` is the value, which does
        not change. The kernels are those that project up from the latents: (rank, heads, content +
        rotary) and (rank, heads, content + value). The shared rotary key is not passed.

    Returns:
      The new query and key weights, in their dtypes.

    Raises:
      ValueError: for an α outside [0, 1], a negative threshold, a `head_axis` that is not the axis
        of heads, or a `content_size` that is not from 1 to the size of a head.

    Deviations: a head whose logit is NaN or infinite is left alone, because such a logit does not
    say by how much to scale it. Megatron-LM scales all heads of a group by their smallest γ.

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
    # Based on the logits, not on the norm of the weights, which many copies use: a large norm does
    # not by itself make large logits.
    gamma = _scales(xla.widen(jnp.asarray(max_logits)), threshold)
    if validate.is_static(alpha) and alpha == 1:
        return jax.tree.map(lambda x: _scale(x, gamma, head_axis), query), key
    own, shared = _share_out(gamma, xla.like(alpha, gamma), _count_heads(key, head_axis))
    new_query = jax.tree.map(lambda x: _scale(x, own, head_axis, content_size, gamma), query)
    return new_query, jax.tree.map(lambda x: _scale(x, shared, head_axis, content_size), key)


def _count_heads(key: Any, axis: int) -> int:
    """Counts the heads of the keys; 0 if the leaves disagree."""
    # Kernels and biases both count: heads can only be told apart if all leaves agree.
    heads = {x.shape[axis] for x in jax.tree.leaves(key) if -x.ndim <= axis < x.ndim}
    return heads.pop() if len(heads) == 1 else 0


def _share_out(gamma: jax.Array, alpha: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """The factors of the query heads, and of the key heads, each shared by a group of queries."""
    if not groups or gamma.shape[0] % groups:
        # Treated as if no key were shared: `_scale` raises if the key has other heads.
        groups = gamma.shape[0]
    rest = gamma ** (1 - alpha)
    shared = jnp.min(rest.reshape(groups, -1), axis=1)
    theirs = jnp.repeat(shared, gamma.shape[0] // groups)
    # Exactly 1 for the head that sets the key's factor, and so for all heads if no key is shared.
    left = jnp.where(theirs == rest, 1, rest / jnp.where(theirs > 0, theirs, 1))
    return gamma**alpha * left, shared


def _scales(largest: jax.Array, threshold: ArrayLike) -> jax.Array:
    """γ for each head."""
    bound = xla.like(threshold, largest)
    over = jnp.isfinite(largest) & (largest > bound)
    return jnp.where(over, bound / jnp.where(over, largest, 1), 1)


def _scale(
    x: jax.Array,
    factors: jax.Array,
    axis: int,
    content_size: int | None = None,
    others: ArrayLike = 1.0,
) -> jax.Array:
    """Multiplies weights by one factor per head, and what follows the content by another."""
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != factors.shape[0]:
        raise ValueError(
            f"{validate.called()}: axis {axis} of weights of shape {x.shape} must have"
            f" size {factors.shape[0]}, the number of heads: max_logits needs one entry per query"
            " head, and the query heads must be a multiple of the key heads. If the heads are on"
            " another axis, pass head_axis=."
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
