"""Actions for examples, `(norms, bounds) -> factors`, in addition to those of `optaxclip.actions`.

Unlike those, they depend on the norm itself and not only on its ratio to the bound. Neither makes
an example longer than its bound, so private noise is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import Action, Part


def _divide_by(longer: Callable[[jax.Array, jax.Array], jax.Array], name: str, given: ArrayLike):
    """The action `bounds / longer(norms, given)`."""

    def rule(norms, bounds):
        # Zeros stay zeros, and no bound means no change, as in `optaxclip.actions`. Both are
        # replaced before the division to keep derivatives finite.
        some = (norms > 0) & ~jnp.isinf(bounds)
        lengths = longer(norms, xla.like(given, norms))
        return jnp.where(some, bounds, 1) / jnp.where(some, lengths, 1)

    return Part(f"per_example.{name}({given})", rule)


@validate.makes_part
@validate.named
def auto_s(gamma: ArrayLike = 0.01) -> Action:
    """Gives every example nearly the length of its bound: b / (n + γ). This is AUTO-S.

    With a bound of 1 there is nothing to tune, because the learning rate absorbs it. The price is
    that short gradients, those of examples that are already learned, are scaled up most.

    Args:
      gamma: γ. An example much shorter than γ keeps its relative length; 0 is AUTO-V, which is
        `actions.normalize`.

    Raises:
      ValueError: if γ is negative, NaN, a boolean or a string.

    References:
      Bu et al., `Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger
      <https://arxiv.org/abs/2206.07136>`_, 2023

    >>> from optaxclip import per_example
    >>> per_example.auto_s(1.0)(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))
    Array([0.5 , 0.25], dtype=float32)
    """
    validate.bound(gamma=gamma, wait=False)
    return _divide_by(lambda norms, gamma: norms + gamma, "auto_s", gamma)


@validate.makes_part
@validate.named
def psac(r: ArrayLike = 0.1) -> Action:
    """Like `auto_s`, without its preference for short gradients: b / (n + r / (n + r)).

    The factor is b at n = 0, rises to b / (2√r - r) at n = √r - r, and falls from there, soon like
    b / n. This is DP-PSAC (per-sample adaptive clipping).

    Args:
      r: how short a gradient has to be to get a smaller factor again; larger than 0. The default is
        ours: the paper tunes it.

    Raises:
      ValueError: if r is not a number larger than 0.

    References:
      Xia et al., `Differentially Private Learning with Per-Sample Adaptive Clipping
      <https://arxiv.org/abs/2212.00328>`_, 2023

    >>> from optaxclip import per_example
    >>> per_example.psac(0.25)(jnp.array([0.25, 0.75]), jnp.array([3.0, 3.0]))
    Array([4., 3.], dtype=float32)
    """
    # With r = 0 the factor of a short gradient would be unbounded.
    validate.positive(r=r)
    return _divide_by(lambda norms, r: norms + r / (norms + r), "psac", r)
