"""Clipping the gradient of each example before they are summed, as differentially private training does."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.leaves import measured_leaves
from optaxclip.per_example.weights import clip_weights, example_norms, normal_weights, weighted_sum
from optaxclip.thresholds.combine import checked


def _check_batched(leaves, call: str) -> None:
    sizes = {x.shape[:1] for x in leaves.arrays}
    if len(sizes) > 1 or () in sizes:
        shapes = dict(zip(leaves.paths, (x.shape for x in leaves.arrays), strict=True))
        raise ValueError(
            f"{call}: every leaf needs a leading axis that numbers the same examples, got shapes {shapes}."
        )


def _clipped_sum(arrays: list[jax.Array], bound: Any):
    """The weighted sum of each array over its examples, and how many examples were clipped."""
    weights = clip_weights(example_norms(arrays), bound)
    return [weighted_sum(x, weights).astype(x.dtype) for x in arrays], jnp.sum(weights < 1)


def per_example_global_norm_clip(grads: Any, l2_norm_clip: jax.typing.ArrayLike) -> tuple[Any, jax.Array]:
    """Sums per-example gradients, each clipped by its global norm: Σᵢ gᵢ · min(1, l2_norm_clip / ‖gᵢ‖).

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples, as `vmap(grad(loss))` returns it.
      l2_norm_clip: the largest norm of one example.

    Returns:
      The sum, without the leading axis, and the number of examples that were clipped (int32). An example with NaN or
      inf in it weighs nothing and counts as clipped, so that the sum stays bounded (Optax gives it a weight of 1).

    Raises:
      ValueError: if a leaf lacks the leading axis, or the bound is negative, NaN, a boolean or a string.

    References:
      Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016

    >>> import jax.numpy as jnp, optaxclip
    >>> grads = [jnp.array([[0.0, 3.0, 4.0], [4.0, 0.0, 3.0], [0.0, 0.0, 1.0]])]
    >>> optaxclip.per_example_global_norm_clip(grads, 2.5)
    ([Array([2. , 1.5, 4.5], dtype=float32)], Array(2, dtype=int32))
    """
    call = "per_example_global_norm_clip"
    bound = checked(l2_norm_clip, call, "l2_norm_clip", wait=False)
    leaves = measured_leaves(jax.tree.map(_as_float, grads))
    _check_batched(leaves, call)
    if not leaves.arrays:
        return grads, jnp.zeros((), jnp.int32)
    sums, clipped = _clipped_sum(leaves.arrays, bound)
    return leaves.rebuild(sums), clipped


def per_example_layer_norm_clip(
    grads: Any, global_l2_norm_clip: jax.typing.ArrayLike, uniform: bool = True
) -> tuple[Any, Any]:
    """Sums per-example gradients, each leaf clipped by its own norm to a share Cᵢ of one bound C, ΣCᵢ² = C².

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples.
      global_l2_norm_clip: C, the largest norm of one example over all leaves.
      uniform: Cᵢ = C / √K for K leaves; if False, Cᵢ = C · √(Dᵢ / D) for leaves of Dᵢ of all D parameters.

    Returns:
      The sum, and a tree with the number of examples clipped in each leaf. Examples that are not finite weigh nothing
      in the leaf concerned.

    Raises:
      ValueError: if a leaf lacks the leading axis, or the bound is negative, NaN, a boolean or a string.

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_,
      2018

    >>> import jax.numpy as jnp, optaxclip
    >>> grads = {"a": jnp.array([[3.0], [1.0]]), "b": jnp.array([[4.0], [1.0]])}
    >>> sums, clipped = optaxclip.per_example_layer_norm_clip(grads, 2 * 2**0.5)
    >>> float(sums["a"][0]), int(clipped["a"])
    (3.0, 1)
    """
    call = "per_example_layer_norm_clip"
    bound = checked(global_l2_norm_clip, call, "global_l2_norm_clip", wait=False)
    leaves = measured_leaves(jax.tree.map(_as_float, grads))
    _check_batched(leaves, call)
    sizes = [1 if uniform else math.prod(x.shape[1:]) for x in leaves.arrays]
    shares = [math.sqrt(size / max(sum(sizes), 1)) for size in sizes]
    done = [_clipped_sum([x], bound * share) for x, share in zip(leaves.arrays, shares, strict=True)]
    return leaves.rebuild([sums[0] for sums, _ in done]), leaves.rebuild([clipped for _, clipped in done])


def per_example_normalize(grads: Any, gamma: jax.typing.ArrayLike = 0.01) -> Any:
    """Sums per-example gradients, each given a norm of nearly 1: Σᵢ gᵢ / (‖gᵢ‖ + γ). AUTO-S: there is no bound to tune.

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples.
      gamma: γ. An example much shorter than it keeps its relative length; 0 is AUTO-V.

    Returns:
      The sum, without the leading axis; its sensitivity to one example is 1. An example with NaN or inf in it weighs
      nothing, nor does one of zeros.

    Raises:
      ValueError: if a leaf lacks the leading axis, or γ is negative, NaN, a boolean or a string.

    References:
      Bu et al., `Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger
      <https://arxiv.org/abs/2206.07136>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> optaxclip.per_example_normalize(jnp.array([[3.0, 4.0], [0.0, 2.0]]), gamma=0.0)
    Array([0.6, 1.8], dtype=float32)
    """
    call = "per_example_normalize"
    gamma = checked(gamma, call, "gamma", wait=False)
    leaves = measured_leaves(jax.tree.map(_as_float, grads))
    _check_batched(leaves, call)
    if not leaves.arrays:
        return grads
    weights = normal_weights(example_norms(leaves.arrays), 1.0, gamma)
    return leaves.rebuild([weighted_sum(x, weights).astype(x.dtype) for x in leaves.arrays])


def _as_float(x):
    """Whole numbers as floating-point ones: Optax's examples sum integer gradients."""
    return x.astype(jnp.float32) if jnp.issubdtype(jnp.result_type(x), jnp.integer) else x
