"""ACClip: momentum with each element clipped to the running mean of its gradients' size."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import Exclude
from optaxclip.clips.carry import start_carry
from optaxclip.engine import Description, guarded
from optaxclip.trees import select


class ACClipState(NamedTuple):
    """State of `scale_by_acclip`: momentum m, and τ, the α-mean of |g|, in float32 at least."""

    momentum: Any
    size: Any


@validate.named
def scale_by_acclip(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    alpha: ArrayLike = 1.0,
    eps: ArrayLike = 1e-5,
    *,
    exclude: Exclude = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips momentum element by element: u = m · min(1, τ / (|m| + ε)).

    m ← b1·m + (1 - b1)·g, and τᵅ ← b2·τᵅ + (1 - b2)·|g|ᵅ. Place it before the learning rate,
    instead of an optimizer.

    Args:
      b1: the decay of m.
      b2: the decay of τᵅ.
      alpha: α, larger than 0.
      eps: ε, in the units of the gradient.
      exclude: leaves that pass unchanged, as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range.

    Deviations: an element that is not finite becomes NaN and leaves no trace in m and τ. The
    authors' code by default has α = 2 and also divides by Adam's root mean square, which is not the
    paper's method.

    References:
      Zhang et al., `Why are Adaptive Methods Good for Attention Models?
      <https://arxiv.org/abs/1912.03194>`_, 2020

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.scale_by_acclip(b1=0.0, b2=0.5)
    >>> updates, _ = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> round(float(updates[0]), 3)  # τ = 2
    2.0
    """
    validate.share(b1=b1, b2=b2)
    validate.positive(alpha=alpha)
    validate.nonnegative(eps=eps)

    def init_fn(params):
        # As in the paper, neither mean is bias-corrected. τ grows more slowly than m, so the first
        # steps are short.
        return ACClipState(start_carry(params, exclude), start_carry(params, exclude, real=True))

    numbers = 1 - b1, 1 - b2, alpha, eps

    def update_fn(updates, state, params, **extra_args):
        leaves, m, size = (select(tree, exclude) for tree in (updates, *state))
        each = zip(leaves.arrays, m.arrays, size.arrays, strict=True)
        done = [_step(*leaf, *numbers) for leaf in each]
        out, momentum, grown = ([each[i] for each in done] for i in range(3))
        return leaves.rebuild(out), ACClipState(m.rebuild(momentum), size.rebuild(grown))

    return guarded(ACClipState, init_fn, update_fn, Description(exclude=exclude, kind="other"))


def _step(g, m, size, *numbers):
    """Computes the update of a leaf, and its new m and τ."""
    rest, pace, power, least = (xla.like(x, size) for x in numbers)
    wide, fine = xla.widen(g), jnp.isfinite(g)
    # `where` on the results: replacing what is not finite by zeros would learn them as gradients.
    moved = jnp.where(fine, m + xla.times(wide - m, rest), m)
    grown = jnp.where(fine, _mean_of_powers(size, jnp.abs(wide), pace, power), size)
    # Otherwise eps = 0 and all zeros would give 0 / 0.
    divisor = jnp.maximum(jnp.abs(moved) + least, jnp.finfo(size.dtype).tiny)
    out = xla.times(moved, jnp.minimum(1, grown / divisor))
    # Per element, not per block: NaN reports a fault that m and τ have already left out.
    return xla.as_dtype_of(g, xla.poison(fine, out)), moved, grown


def _mean_of_powers(size, modulus, pace, power):
    """Computes ((1 - pace)·sizeᵖ + pace·modulusᵖ)^(1/p)."""
    # In units of the larger of the two, so that no power overflows.
    larger = jnp.maximum(size, modulus)
    unit = jnp.where(larger > 0, larger, 1)
    mean = (1 - pace) * (size / unit) ** power + pace * (modulus / unit) ** power
    return unit * mean ** (1 / power)
