"""A quantile of the norms, tracked in one number."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.thresholds.learned import Statistic, learned


@validate.named
def quantile(
    quantile: ArrayLike = 0.5, learning_rate: ArrayLike = 0.2, init: ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """A quantile of the norms, tracked in one number: C ← C · exp(-η · ([n ≤ C] - q)).

    C settles where a share q of the norms is below it. It moves by a factor of at most exp(η) per
    step, however large a spike is.

    Args:
      quantile: q, the share of norms to be within the bound, from 0 to 1.
      learning_rate: η.
      init: the first bound; None: the first norm.

    Raises:
      ValueError: for numbers out of range.

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> threshold = thresholds.quantile(0.5, learning_rate=0.2, init=1.0)
    >>> bound, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), round(float(threshold.update(jnp.array(3.0), state)[0]), 4)
    (1.0, 1.1052)
    """
    validate.between(0, 1, quantile=quantile)
    validate.nonnegative(learning_rate=learning_rate)
    if init is not None:
        validate.nonnegative(init=init)

    def learn(norm, value, seen):
        within = (norm <= value).astype(norm.dtype)
        moved = value * jnp.exp(xla.like(learning_rate, norm) * (xla.like(quantile, norm) - within))
        if init is None:
            return jnp.where(seen == 0, norm, moved)
        # `init` may be 0 or infinity, and multiplying would never change those.
        limits = jnp.finfo(norm.dtype)
        return jnp.clip(moved, limits.tiny, limits.max)

    # Without `init` the first norm is not bounded, so the start value is never used as a bound.
    statistic = Statistic(1.0 if init is None else init, learn, lambda norm, value, seen: value)
    return learned(statistic, warmup_steps=1 if init is None else 0)
