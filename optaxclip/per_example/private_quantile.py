"""A bound that follows the norms of the examples and reveals little about any one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import AxisNames
from optaxclip.per_example.losses import as_weights


class QuantileState(NamedTuple):
    """State of `private_quantile`.

    Attributes:
      bound: C, or (K,) for K blocks, for the next batch.
      key: the random key for the next noise.
    """

    bound: jax.Array
    key: jax.Array


class PrivateQuantile(NamedTuple):
    """A bound that learns from batches.

    Attributes:
      init: `init(key)` returns the state before the first batch.
      update: `update(norms, state, weights=None)` returns the state after a batch whose examples
        have these norms and were clipped to `state.bound`.
    """

    init: Callable[[jax.Array], QuantileState]
    update: Callable[..., QuantileState]


@validate.named
def private_quantile(
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    init: ArrayLike = 0.1,
    *,
    batch_size: ArrayLike,
    noise: ArrayLike | None = None,
    axis_names: AxisNames | None = None,
) -> PrivateQuantile:
    """Tracks a bound that a share q of examples is within: C ← C · exp(-η · (b̃ - q)).

    b̃ = ½ + (Σᵢ (bᵢ - ½) + 𝒩(0, σ_b²)) / m is a noisy count, held between 0 and 1, where bᵢ is 1 if
    example i (or user i) was within C, else 0. The state holds C, which bounds the next batch:

        (_, seen), total = clipped_value_and_grad(loss, state.bound, reduce="sum")(params, batch)
        state = tracker.update(seen.norms, state)

    One example moves the sum by at most ½. So a step whose gradients get noise of z_Δ · C, where
    z_Δ = (z⁻² - (2σ_b)⁻²)^(-½), costs as much with the count as noise of z · C would cost without
    it. For K blocks, which have K bounds, the term is K·(2σ_b)⁻².

    Args:
      quantile: q, from 0 to 1.
      learning_rate: η.
      init: the first bound, larger than 0; for K blocks (K,), one for each.
      batch_size: m, the size of a batch; for a Poisson sample the expected size, because the actual
        one is not private.
      noise: σ_b, the deviation of the noise on the count; None is m / 20, as in the paper. 0 is not
        private.
      axis_names: as in `optaxclip.clip_by`: inside `shard_map(check_vma=False)`, the mesh axes over
        which the examples are spread.

    Returns:
      A `PrivateQuantile`. Its `update` takes the norms (B,) or (B, K) of a `ClippedExamples`, and
      the weights of the examples: an example without weight does not count, and one that is not
      finite counts as q, which does not move the bound.

    Raises:
      ValueError: for numbers out of range; at the update, for norms whose shape is not (B,), or
        (B, K) for K bounds.

    Deviations: counts are shifted by ½ and b̃ is held between 0 and 1, as in the authors' code, so
    that no draw moves C by more than a factor of exp(η).

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021

    >>> import jax, jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> tracker = per_example.private_quantile(0.5, init=1.0, batch_size=4, noise=0.0)
    >>> state = tracker.init(jax.random.key(0))
    >>> state = tracker.update(jnp.array([0.5, 2.0, 3.0, 4.0]), state)
    >>> round(float(state.bound), 4)  # exp(0.2 · (0.5 - 0.25))
    1.0513
    """
    validate.between(0, 1, quantile=quantile)
    validate.nonnegative(learning_rate=learning_rate, noise=0 if noise is None else noise)
    validate.positive(batch_size=batch_size)
    for start in np.ravel(init):
        validate.positive(init=start)
    deviation = batch_size / 20 if noise is None else noise

    def init_fn(key):
        # Not the caller's key, whose buffer would be deleted when the state is donated.
        return QuantileState(jnp.array(init, jnp.result_type(float)), jax.random.fold_in(key, 0))

    def update_fn(norms, state, weights=None):
        bound = state.bound
        _check_norms(norms, bound)
        counts = _count(norms, bound, as_weights(weights, norms.shape[0]), quantile)
        counts = xla.find_span([counts], [""], axis_names).pool(counts, "sum")
        # After the sum over devices, with one key for all: otherwise each would add its own noise.
        key, drawn = jax.random.split(state.key)
        drawn = jax.random.normal(drawn, bound.shape, bound.dtype)
        counts = counts + xla.like(deviation, bound) * drawn
        share = jnp.clip(0.5 + counts / xla.like(batch_size, bound), 0, 1)
        rate, aim = xla.like(learning_rate, bound), xla.like(quantile, bound)
        moved = bound * jnp.exp(rate * (aim - share))
        # No factor can move 0 or infinity, which noise alone could reach in a long run.
        limits = jnp.finfo(bound.dtype)
        return QuantileState(jnp.clip(moved, limits.tiny, limits.max), key)

    # Names the errors of an update after the public call.
    update_fn.__name__ = "private_quantile"
    return PrivateQuantile(init_fn, validate.named(update_fn))


def _check_norms(norms: jax.Array, bound: jax.Array) -> None:
    # Norms (B,) would silently be compared with each of K bounds.
    if jnp.ndim(norms) != 1 + bound.ndim or norms.shape[1:] != bound.shape:
        raise ValueError(
            f"{validate.called()}: norms must have a leading axis of examples, followed by the"
            f" shape of the bound, {bound.shape}; got shape {jnp.shape(norms)}."
        )


def _count(norms: jax.Array, bound: jax.Array, weights: jax.Array, quantile: ArrayLike) -> Any:
    """Computes Σᵢ (bᵢ - ½) for each bound."""

    def count(norm, weight):
        within = (norm <= bound.astype(norm.dtype)).astype(bound.dtype)
        counted = jnp.where(jnp.isfinite(norm), within, xla.like(quantile, bound)) - 0.5
        return jnp.where(weight > 0, counted, 0)

    return jnp.sum(jax.vmap(count)(norms, weights), axis=0)
