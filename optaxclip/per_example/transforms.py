"""Clipping gradients of examples before they are summed, as private training does."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import validate
from optaxclip.actions import as_action, rescale
from optaxclip.base import Action
from optaxclip.per_example.factors import auto_s
from optaxclip.per_example.weights import example_norms, weigh, weighted_sum
from optaxclip.trees import Leaves, select


@validate.named
def per_example_global_norm_clip(
    grads: Any, l2_norm_clip: ArrayLike, action: Action | None = None
) -> tuple[Any, jax.Array]:
    """Sums gradients of examples, each clipped by its global norm: Σᵢ gᵢ · min(1, C / ‖gᵢ‖).

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples, as returned by
        `vmap(grad(loss))`. With no examples the sum is zeros.
      l2_norm_clip: C, the largest norm of one example.
      action: what happens to an example: `actions.rescale` (None), `per_example.auto_s()`,
        `per_example.psac()`, or any other `(norms, bounds) -> factors`.

    Returns:
      The sum, without the leading axis, and the number of examples that were clipped (int32). An
      example that contains NaN or inf has weight 0 and counts as clipped, so the sum stays bounded
      (Optax gives it a weight of 1).

    Raises:
      ValueError: if a leaf lacks the leading axis, or the bound is negative, NaN, a boolean or a
        string.

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> grads = [jnp.array([[0.0, 3.0, 4.0], [4.0, 0.0, 3.0], [0.0, 0.0, 1.0]])]
    >>> per_example.per_example_global_norm_clip(grads, 2.5)
    ([Array([2. , 1.5, 4.5], dtype=float32)], Array(2, dtype=int32))
    """
    validate.bound(l2_norm_clip=l2_norm_clip, wait=False)
    leaves = _select_batched(grads)
    if not leaves.arrays:
        return grads, jnp.zeros((), jnp.int32)
    # One weight per example for all of its leaves, computed before any leaf is summed.
    sums, clipped = _clip_and_sum(leaves.arrays, leaves.paths, l2_norm_clip, as_action(action))
    # A sum, not a mean: it is divided after the noise, by a batch size that is not private.
    return leaves.rebuild(sums), clipped


@validate.named
def per_example_layer_norm_clip(
    grads: Any, global_l2_norm_clip: ArrayLike, uniform: bool = True
) -> tuple[Any, Any]:
    """Sums gradients of examples, each leaf clipped by its own norm to Cᵢ, where ΣCᵢ² = C².

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples.
      global_l2_norm_clip: C, the largest norm of one example over all leaves.
      uniform: Cᵢ = C / √K for K leaves; if False, Cᵢ = C · √(Dᵢ / D) for leaves of Dᵢ of all D
        parameters.

    Returns:
      The sum, and a tree with the number of examples clipped in each leaf. An example that is not
      finite in a leaf has weight 0 there.

    Raises:
      ValueError: if a leaf lacks the leading axis, or the bound is negative, NaN, a boolean or a
        string.

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2018

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> grads = {"a": jnp.array([[3.0], [1.0]]), "b": jnp.array([[4.0], [1.0]])}
    >>> sums, clipped = per_example.per_example_layer_norm_clip(grads, 2 * 2**0.5)
    >>> float(sums["a"][0]), int(clipped["a"])
    (3.0, 1)
    """
    validate.bound(global_l2_norm_clip=global_l2_norm_clip, wait=False)
    validate.flag(uniform=uniform)
    leaves = _select_batched(grads)
    # In both cases ΣCᵢ² = C², so the norm of an example over all leaves is within C.
    sizes = [1 if uniform else math.prod(shape[1:]) for shape in leaves.shapes]
    bounds = [global_l2_norm_clip * math.sqrt(size / max(sum(sizes), 1)) for size in sizes]
    done = [
        _clip_and_sum([x], ("",), c, rescale) for x, c in zip(leaves.arrays, bounds, strict=True)
    ]
    return leaves.rebuild([s for (s,), _ in done]), leaves.rebuild([count for _, count in done])


@validate.named
def per_example_normalize(grads: Any, gamma: ArrayLike = 0.01) -> Any:
    """Sums gradients of examples, each given a norm of nearly 1: Σᵢ gᵢ / (‖gᵢ‖ + γ).

    This is AUTO-S: there is no bound to tune.

    Args:
      grads: a tree whose leaves all have a leading axis that numbers the examples.
      gamma: γ. An example much shorter than γ keeps its relative length; 0 is AUTO-V.

    Returns:
      The sum, without the leading axis; its sensitivity to one example is 1. An example that
      contains NaN or inf adds nothing, nor does one of zeros.

    Raises:
      ValueError: if a leaf lacks the leading axis, or γ is negative, NaN, a boolean or a string.

    References:
      Bu et al., `Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger
      <https://arxiv.org/abs/2206.07136>`_, 2023

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> per_example.per_example_normalize(jnp.array([[3.0, 4.0], [0.0, 2.0]]), gamma=0.0)
    Array([0.6, 1.8], dtype=float32)
    """
    # A length of 1, not C: the learning rate absorbs it, so there is nothing to tune.
    return per_example_global_norm_clip(grads, 1.0, auto_s(gamma))[0]


def _select_batched(grads: Any) -> Leaves:
    """Selects the leaves of a tree of gradients of examples.

    Raises:
      ValueError: naming the shapes, unless all have the same leading axis.
    """
    leaves = select(jax.tree.map(_as_float, grads))
    # Scalars have `shape[:1] == ()`: several would agree on a leading axis that none of them has.
    if len({shape[:1] for shape in leaves.shapes}) > 1 or () in leaves.shapes:
        raise validate.fail(
            "every leaf must have a leading axis that numbers the same examples",
            dict(zip(leaves.paths, leaves.shapes, strict=True)),
        )
    return leaves


def _as_float(x):
    """Converts integers to float32: Optax's own tests sum integer gradients."""
    return x.astype(jnp.float32) if jnp.issubdtype(getattr(x, "dtype", bool), jnp.integer) else x


def _clip_and_sum(arrays: list[jax.Array], paths, bound: ArrayLike, action: Action):
    """Computes the weighted sum of each array over its examples, and counts those clipped."""
    # Optax gives an example with NaN the weight 1, which poisons the sum; here it gets 0, which is
    # below 1 and counts as clipped.
    weights = weigh(action, example_norms(arrays, paths), bound)
    return [weighted_sum(x, weights).astype(x.dtype) for x in arrays], jnp.sum(weights < 1)
