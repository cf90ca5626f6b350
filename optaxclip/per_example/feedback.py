"""Adding back, step by step, what the clip of examples cut off."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.clips.carry import start_carry
from optaxclip.core import clip_by
from optaxclip.engine import Description, guarded
from optaxclip.trees import select


class FeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: e, a tree like the parameters, in float32 at least. It is made from gradients that were
        not clipped, so it is as private as the data: noise hides it in the updates, not here.
    """

    error: Any


@validate.named
def error_feedback(max_error: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Adds to clipped gradients what the clip cut off before: v = g + clip(e), e ← e + f - v.

    g is the mean of the clipped gradients of examples, and f that of the unclipped ones. Together
    with `clipped_value_and_grad(..., keep_unclipped=True)` and noise, this is DiceSGD:

        (_, seen), grads = step(params, batch)
        updates, state = tx.update(grads, state, params, unclipped=seen.unclipped)

    where tx is `optax.chain(error_feedback(1.0), noise, optax.sgd(0.1))`. On average nothing is
    lost if ‖f - g‖ is below C₂: training settles where it would without a clip, whatever the bound
    of an example is.

    Args:
      max_error: C₂, the largest norm of e that is added; at least the bound C₁ of an example.

    Returns:
      A transformation whose `update` needs `unclipped=`, a tree like the updates, and whose state
      is a `FeedbackState`. A step that is not finite leaves e unchanged.

    Raises:
      ValueError: if C₂ is negative, NaN, a boolean or a string; at the update, without
        `unclipped=`.

    On privacy: given e, one example moves v by as much as it moves g. But it has also moved e at
    every earlier step, so noise that is right for the clip alone is too little. Use the paper's
    noise, and publish neither the state nor a checkpoint of it.

    References:
      Zhang et al., `Differentially Private SGD Without Clipping Bias: An Error-Feedback Approach
      <https://arxiv.org/abs/2311.14632>`_, 2024

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> tx = per_example.error_feedback(1.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):  # the gradient is 1.5, of which the clip leaves 1
    ...     updates, state = tx.update(jnp.array([1.0]), state, unclipped=jnp.array([1.5]))
    ...     print(updates)
    [1.]
    [1.5]
    [1.5]
    """
    validate.bound(max_error=max_error)
    clip = clip_by(max_error)

    def init_fn(params):
        return FeedbackState(start_carry(params, None))

    def update_fn(updates, state, params=None, *, unclipped=None, **extra_args):
        _check_unclipped(unclipped, updates)
        leaves, whole, error = select(updates), select(unclipped), select(state.error)
        # With a fresh state, which is dropped: this clip learns nothing, and its metrics would be
        # mistaken for those of the clip of examples.
        returned = select(clip.update(state.error, clip.init(state.error))[0]).arrays
        out = [xla.widen(g) + r for g, r in zip(leaves.arrays, returned, strict=True)]
        rests = zip(error.arrays, whole.arrays, out, strict=True)
        kept = _hold([e + (xla.widen(f) - v) for e, f, v in rests], error.arrays)
        out = list(map(xla.as_dtype_of, leaves.arrays, out))
        return leaves.rebuild(out), FeedbackState(error.rebuild(kept))

    return guarded(FeedbackState, init_fn, update_fn, Description(kind="other"))


def _check_unclipped(unclipped: Any, updates: Any) -> None:
    if jax.tree.structure(unclipped) != jax.tree.structure(updates):
        raise ValueError(
            "error_feedback: update needs unclipped=, the mean of the gradients without the clip,"
            " as a tree like the updates: clipped_value_and_grad(..., keep_unclipped=True) returns"
            " it in examples.unclipped."
        )


def _hold(new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
    """Returns the new arrays, or the old ones if any is not finite: NaN would stay in e forever."""
    fine = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in new]))
    return [jnp.where(fine, a, b) for a, b in zip(new, old, strict=True)]
