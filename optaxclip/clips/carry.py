"""Trees that a clip keeps element by element, shaped like the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import trees, xla
from optaxclip.base import Exclude


def start_carry(params: Any, exclude: Exclude, *, real: bool = False) -> Any:
    """Makes a tree of zeros like the parameters, in float32 at least for leaves that are measured.

    Other arrays get zeros too, so that anything with the structure of the parameters (shardings,
    say) has the structure of the state.

    Args:
      params: arrays, or their shapes.
      exclude: as in `clip_by`.
      real: whether the zeros for complex numbers are real.
    """
    zeros = trees.select(jax.tree.map(_zeros, params), exclude)
    # Wide: at every step a carry in bfloat16 would lose additions below 1/256 of itself.
    wide = [xla.widen(x) for x in zeros.arrays]
    return zeros.rebuild([x.real for x in wide] if real else wide)


def _zeros(x: Any) -> Any:
    dtype = getattr(x, "dtype", None)
    numeric = dtype is not None and jnp.issubdtype(dtype, jnp.number)
    # Random keys and static fields have no zero; they are kept, so that the trees match.
    return jnp.zeros_like(x) if numeric or trees.is_measured(x) else x


def can_learn(state: Any, *, zeros: bool = True) -> jax.Array:
    """Checks whether all norms of a clip were finite and, without `zeros`, not all zero.

    The whole tree on all devices gets one decision, so a step is learned as a whole or not at all.
    """
    norms = jax.tree.leaves(state.metrics.grad_norm)
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(n)) for n in norms]))
    zero = jnp.all(jnp.array([jnp.all(n == 0) for n in norms]))
    # Norms of units differ between devices that hold different units.
    return xla.hold_everywhere(finite) & (zeros | ~xla.hold_everywhere(zero))
