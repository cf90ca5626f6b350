"""The rule of OLMo: a norm may be a multiple of the running mean of clipped norms."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import feeds, validate, xla
from optaxclip.thresholds.learned import Statistic, learned, multiple_of


@validate.named
def norm_ratio(
    ratio: ArrayLike = 2.0,
    decay: ArrayLike = 0.95,
    *,
    relearn_after: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A multiple of the running mean of clipped norms, like `max_grad_norm_ratio` in OLMo.

    τ = ratio · m, and m ← β·m + (1 - β)·min(n, τ), from m = n at the first norm, which is free. In
    OLMo each parameter has a norm of its own, `scope=scopes.leaf`; with `scopes.tree` the norm is
    the global one.

    Args:
      ratio: the multiple, larger than 1. Norms can rise by a factor of β + (1 - β) · ratio a step.
      decay: β; in OLMo the larger of the optimizer's two.
      relearn_after: as in `learned`.

    Raises:
      ValueError: for a ratio of at most 1, with which norms could only fall, or a decay outside [0,
        1).

    Deviations: a norm of zero is not learned (in OLMo a mean that starts at zero stays there, and
    holds the parameter forever), nor one that is not finite. No 1e-6 is added to the norm. OLMo
    starts from the norm of the second step.

    References:
      The optimizers in the code of `OLMo <https://github.com/allenai/OLMo>`_, 2024

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import scopes, thresholds
    >>> tx = optaxclip.clip_by(thresholds.norm_ratio(2.0), scope=scopes.leaf)
    >>> state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    >>> for g in (1.0, 9.0):
    ...     updates, state = tx.update({"a": jnp.array([g]), "b": jnp.array([10.0])}, state)
    >>> updates
    {'a': Array([2.], dtype=float32), 'b': Array([10.], dtype=float32)}
    """
    validate.above(1, ratio=ratio)
    validate.share(decay=decay)

    def learn(norm, mean, seen):
        # Starts from the first norm. With a debiased mean, as in `running`, the second norm would
        # weigh as much as the first, and an early spike would raise the bound at once.
        moved = mean + xla.like(1 - xla.here(decay), norm) * (norm - mean)
        return jnp.where(seen == 0, norm, moved)

    statistic = Statistic(0.0, learn, multiple_of(ratio))
    # Fed clipped norms: with raw ones the spike that was just clipped would raise the next bound.
    return learned(statistic, feed=feeds.clipped, relearn_after=relearn_after)
