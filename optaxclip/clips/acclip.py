"""ACClip: momentum, each element clipped to the running mean of its gradients' size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import as_dtype_of
from optaxclip.leaves import Exclude, measured_leaves
from optaxclip.norms import times, widen
from optaxclip.thresholds.learned import number


class ACClipState(NamedTuple):
    """State of `scale_by_acclip`: momentum m, and τ, the running α-mean of |g|, in float32 at least."""

    momentum: Any
    size: Any


def scale_by_acclip(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    alpha: ArrayLike = 1.0,
    eps: ArrayLike = 1e-5,
    *,
    exclude: Exclude = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, clipped element by element: u = m · min(1, τ / (|m| + ε)).

    m ← b1·m + (1 - b1)·g, and τᵅ ← b2·τᵅ + (1 - b2)·|g|ᵅ. Place it before the learning rate, in place of an optimizer.

    Args:
      b1: the decay of m.
      b2: the decay of τᵅ.
      alpha: α, larger than 0.
      eps: ε.
      exclude: leaves that pass as they are, as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range.

    Deviations: an element that is not finite comes out as NaN, and leaves no trace in m and τ. The authors' code has
    α = 2 and divides by Adam's root mean square too, unless told otherwise; that is not the paper's method.

    References:
      Zhang et al., `Why are Adaptive Methods Good for Attention Models? <https://arxiv.org/abs/1912.03194>`_, 2020

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.scale_by_acclip(b1=0.0, b2=0.5)
    >>> updates, _ = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> round(float(updates[0]), 3)  # τ = 2
    2.0
    """
    call = "scale_by_acclip"
    b1, b2 = number(b1, call, "b1", 0.0, 1.0), number(b2, call, "b2", 0.0, 1.0)
    alpha, eps = number(alpha, call, "alpha", 1e-3), number(eps, call, "eps", 0.0)

    def init_fn(params):
        zeros = measured_leaves(jax.tree.map(jnp.zeros_like, params), exclude)
        wide = [widen(x) for x in zeros.arrays]
        return ACClipState(zeros.rebuild(wide), zeros.rebuild([x.real for x in wide]))

    def one(g, m, size):
        rest, pace, power, least = (jnp.asarray(x).astype(size.dtype) for x in (1 - b1, 1 - b2, alpha, eps))
        wide, fine = widen(g), jnp.isfinite(g)
        moved = jnp.where(fine, m + times(wide - m, rest), m)
        # The mean of powers in units of the larger of both: no power overflows.
        modulus = jnp.abs(wide)
        unit = jnp.where(jnp.maximum(size, modulus) > 0, jnp.maximum(size, modulus), 1)
        grown = unit * ((1 - pace) * (size / unit) ** power + pace * (modulus / unit) ** power) ** (1 / power)
        grown = jnp.where(fine, grown, size)
        out = times(moved, jnp.minimum(1, grown / jnp.maximum(jnp.abs(moved) + least, jnp.finfo(size.dtype).tiny)))
        return as_dtype_of(g, jnp.where(fine, out, jnp.nan)), moved, grown

    def update_fn(updates, state, params=None, **extra_args):
        leaves, m, size = (measured_leaves(tree, exclude) for tree in (updates, *state))
        done = [one(*each) for each in zip(leaves.arrays, m.arrays, size.arrays, strict=True)]
        out, momentum, grown = ([each[i] for each in done] for i in range(3))
        return leaves.rebuild(out), ACClipState(m.rebuild(momentum), size.rebuild(grown))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
