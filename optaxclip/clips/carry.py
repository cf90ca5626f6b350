"""Trees that a clip keeps element by element, shaped like the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import trees, xla
from optaxclip.base import Exclude
from optaxclip.record import metrics_of


def start_carry(params: Any, exclude: Exclude, *, real: bool = False) -> Any:
    """A tree of zeros like the parameters, in float32 at least where they are measured.

    Zeros stand for the other arrays, too, so that whatever has the structure of the parameters
    (shardings, say) has that of the state.

    Args:
      params: arrays, or their shapes.
      exclude: as in `clip_by`.
      real: whether what is kept of complex numbers is real.
    """
    zeros = trees.select(jax.tree.map(_zeros, params), exclude)
    # Wide: a carry in bfloat16 would lose what is below 1/256 of it at every step.
    wide = [xla.widen(x) for x in zeros.arrays]
    return zeros.rebuild([x.real for x in wide] if real else wide)


def _zeros(x: Any) -> Any:
    dtype = getattr(x, "dtype", None)
    numeric = dtype is not None and jnp.issubdtype(dtype, jnp.number)
    # Random keys and static fields have no zero; they stay, so that the trees match.
    return jnp.zeros_like(x) if numeric or trees.is_measured(x) else x


def can_learn(state: optax.OptState, *, zeros: bool = True) -> jax.Array:
    """Whether all that a clip has measured was finite and, without `zeros`, not all zero.

    One decision for the whole tree on all devices, which so is that of one step.
    """
    norms = jax.tree.leaves(metrics_of(state).grad_norm)
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(n)) for n in norms]))
    zero = jnp.all(jnp.array([jnp.all(n == 0) for n in norms]))
    # Norms of units differ between devices that hold different ones.
    return xla.hold_everywhere(finite) & (zeros | ~xla.hold_everywhere(zero))
