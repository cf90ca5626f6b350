"""Clippy: no parameter changes by more than a share of itself in one step."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, validate, xla
from optaxclip.base import AxisNames, Exclude, Nonfinite, Scope
from optaxclip.core import clip_by
from optaxclip.norms import linf


@validate.named
def clippy(
    relative: ArrayLike = 0.5,
    absolute: ArrayLike = 1e-2,
    *,
    scope: Scope = scopes.leaf,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens each leaf's step until |Δᵢ| ≤ λ·|wᵢ| + a for each element i.

    Δ ← Δ · min(1, minᵢ (λ·|wᵢ| + a) / |Δᵢ|). Place it last in the chain, after the learning rate.
    `update` needs `params`.

    Args:
      relative: λ.
      absolute: a, larger than 0: how far a parameter of zero may move. One such parameter limits
        its whole leaf, so with the 1e-7 of the authors' code a fresh bias or embedding stays where
        it is.
      scope: which numbers are shortened together; the paper's is `scopes.leaf`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a negative λ, or an a that is not positive; at the update, if `params` is
        missing.

    Deviations: the third term of the authors' code, which needs Adagrad's accumulator, is left out.

    The norm in the metrics is the largest ratio |Δᵢ| / (λ|wᵢ| + a), and the bound is 1.

    References:
      Tang et al., `Improving Training Stability for Multitask Ranking Models in Recommender Systems
      <https://arxiv.org/abs/2302.09178>`_, 2023

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clippy(0.5, 0.5)
    >>> params = jnp.array([1.0, 0.0])
    >>> tx.update(jnp.array([2.0, 0.1]), tx.init(params), params)[0]
    Array([1.  , 0.05], dtype=float32)
    """
    validate.nonnegative(relative=relative)
    # At 0, one weight of exactly zero would freeze its whole leaf forever.
    validate.positive(absolute=absolute)

    def ratio(update, param):
        size = jnp.abs(param)
        # Cast instead of `float(...)`, because under `inject_hyperparams` both are tracers.
        share, least = (xla.like(x, size) for x in (relative, absolute))
        # The inverse of the paper's ratio, so that an element that does not move gives 0, not 0/0.
        return jnp.abs(update) / (share * size + least).astype(update.real.dtype)

    return clip_by(
        1.0,
        norm=linf,
        view=ratio,
        scope=scope,
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
