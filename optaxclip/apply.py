"""From norms and bounds to clipped leaves: the factor of each block, and the one multiply of each leaf."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.actions import Action
from optaxclip.norms import times, widen
from optaxclip.scopes import Cut

Nonfinite = Literal["propagate", "zero"]

_FAR = 2.0**100
_STEP = 2.0**60


class Factors(NamedTuple):
    """What blocks are multiplied by: `1 / step`, then `fine / veto`.

    The divisions are left to `Cut.spread`, at the last moment: a division is what keeps XLA's CPU compiler from copying
    the whole chain, for all blocks, into the loop of each of many leaves, which would cost 5 times the compile time.

    Attributes:
      step: 1, or 2⁶⁰ for a block so far over its bound that one factor (below 1e-38) would be no float32 any more.
      fine: what the action says, in that unit.
      veto: 1; for a block that is not finite what turns any factor into NaN or 0, by policy.
      factor: all of it in one number, for the record.
      clipped: 1 where the block is longer than its bound, else 0.
    """

    step: Any
    fine: Any
    veto: Any
    factor: Any
    clipped: Any


def factors_of(lengths, units, bounds, *, action: Action, nonfinite: Nonfinite) -> Factors:
    """The factors of blocks, given their lengths (in `units`, see `Measured`) and bounds; a negative bound counts as 0.

    A block that is 2¹⁰⁰ times its bound is in the far regime of every action: its factor is proportional to the bound.
    """
    bounds = jnp.maximum(bounds.astype(lengths.dtype), 0) * units
    finite = jnp.isfinite(lengths)
    lengths = jnp.where(finite, lengths, 0)
    step = jnp.where(lengths > _FAR * bounds, _STEP, 1).astype(lengths.dtype)
    fine = action(lengths, bounds * step)
    veto = jnp.where(finite, 1, jnp.nan if nonfinite == "propagate" else jnp.inf).astype(lengths.dtype)
    return Factors(step, fine, veto, fine / step / veto, (lengths > bounds).astype(lengths.dtype))


def multiply(arrays: list[jax.Array], factors: Factors, cut: Cut, nonfinite: Nonfinite) -> list[jax.Array]:
    """Each leaf times its factors, in at least float32, rounded once to its own dtype."""

    def scaled(x, coarse, fine):
        out = times(times(widen(x), coarse), fine)
        if nonfinite == "zero":  # 0 times inf is NaN: only this policy pays for a select
            out = jnp.where(fine == 0, jnp.zeros_like(out), out)
        return as_dtype_of(x, out)

    ones = jax.tree.map(jnp.ones_like, factors.step)
    return list(map(scaled, arrays, cut.spread(ones, factors.step), cut.spread(factors.fine, factors.veto)))


def as_dtype_of(x: jax.Array, out: jax.Array) -> jax.Array:
    """`out` in the dtype of `x`, weak type included."""
    out = _bfloat16(out) if (out.dtype, x.dtype) == (jnp.float32, jnp.bfloat16) else out.astype(x.dtype)
    return x.at[...].set(out) if x.weak_type else out


@jax.custom_jvp
def _bfloat16(x: jax.Array) -> jax.Array:
    """A float32 rounded to bfloat16, ties to even, in whole numbers.

    XLA's CPU compiler holds a conversion for dear, and would keep a copy of all gradients rather than convert them in
    each loop of the optimizer that reads them: that doubles the time of AdamW. Shifts and additions it does repeat.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + jnp.uint32(0x7FFF) + (bits >> 16 & jnp.uint32(1))) >> 16
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), upper)  # whose bits might round to those of inf
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals, tangents):
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)
