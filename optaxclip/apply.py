"""From norms and bounds to clipped leaves: the factor of each block, and the one multiply of each leaf."""

from typing import Literal

import jax
import jax.numpy as jnp

from optaxclip.actions import Action
from optaxclip.norms import widen

Nonfinite = Literal["propagate", "zero"]

_FAR = 2.0**100
_STEP = 2.0**60


def factors_of(action: Action, nonfinite: Nonfinite, lengths, units, bounds):
    """What blocks are multiplied by: `(coarse, fine, factor, clipped)`, the factor being coarse times fine.

    A factor below 1e-38 is no float32 any more.  So a block that is 2¹⁰⁰ times its bound is first multiplied by a coarse
    2⁻⁶⁰; there every action is in its far regime, where its factor is proportional to the bound.

    Args:
      action: the action.
      nonfinite: the policy for blocks that are not finite.
      lengths: the norms, in `units`.
      units: the units of the lengths, 1 for all but enormous blocks.
      bounds: the bounds, in units of 1; a negative bound counts as 0.
    """
    bounds = jnp.maximum(bounds.astype(lengths.dtype), 0) * units
    finite = jnp.isfinite(lengths)
    lengths = jnp.where(finite, lengths, 0)
    step = jnp.where(lengths > _FAR * bounds, _STEP, 1).astype(lengths.dtype)
    # Both end in a division by something that XLA cannot see through. It is what keeps XLA's CPU compiler from copying
    # the whole chain, for all blocks, into the loop of each of many leaves, which costs 5 times the compile time.
    coarse = 1 / step
    fine = action(lengths, bounds * step) / jnp.where(finite, 1, jnp.nan if nonfinite == "propagate" else jnp.inf)
    return coarse, fine, coarse * fine, (lengths > bounds).astype(lengths.dtype)


def multiply(arrays: list[jax.Array], coarse: list, fine: list, nonfinite: Nonfinite) -> list[jax.Array]:
    """Each leaf times its factors, in at least float32, rounded once to its own dtype."""

    def scaled(x, coarse, fine):
        wide = widen(x)
        dtype = wide.real.dtype
        out = _times(_times(wide, coarse.astype(dtype)), fine.astype(dtype)).astype(x.dtype)
        if nonfinite == "zero":  # 0 times inf is NaN: only this policy pays for a select
            out = jnp.where(fine == 0, jnp.zeros_like(out), out)
        return x.at[...].set(out) if x.weak_type else out

    return list(map(scaled, arrays, coarse, fine))


def _times(x, factor):
    """`x * factor` for a real factor. JAX would make it complex, and lose the sign of a zero."""
    return jax.lax.complex(x.real * factor, x.imag * factor) if jnp.iscomplexobj(x) else x * factor
