"""Sites, where a parameter acts on an example, and the norm of its gradient without forming it.

The gradient of a parameter that is used once, by an operation that is linear in it, is made from
the input x of that operation and the gradient dy of its output:

    dense, (T, d) by (d, p)      G = Σₜ xₜ ⊗ dyₜ        ‖G‖² = Σₛₜ ⟨xₛ, xₜ⟩ · ⟨dyₛ, dyₜ⟩
    convolution                  the same, where xₜ is the patch that one output position sees
    rows of a table              the same, where xₜ is one-hot: ⟨xₛ, xₜ⟩ = [idₛ = idₜ]
    one slice                    ‖G‖ = ‖dy‖

A site is kept only if this takes less work and memory than the gradient itself, T·(d + p) <= d·p.
Nothing is then larger than the activations that the backward pass keeps anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from optaxclip.per_example.products import length, product_squares, row_norms, total
from optaxclip.per_example.walk import Op, Origin, Program, get_aval
from optaxclip.xla import accumulator


class Site(NamedTuple):
    """The only use of a parameter.

    Attributes:
      origin: the parameter, and how it is rearranged before it is used.
      op: the operation, with one result.
      side: which of its operands is the parameter.
      norms: `norms(operands, dy)`, one norm per example; operands and dy have a leading axis that
        numbers examples, and their squares must neither overflow nor vanish.
    """

    origin: Origin
    op: Op
    side: int
    norms: Callable[[list[jax.Array], jax.Array], jax.Array]


def _as_rows(x: jax.Array, row_axes, column_axes) -> jax.Array:
    """Reshapes (B, ...) to (B, T, d). Axes are counted without that of the examples."""
    order = [0, *(a + 1 for a in row_axes), *(a + 1 for a in column_axes)]
    rows = math.prod(x.shape[a + 1] for a in row_axes)
    columns = math.prod(x.shape[a + 1] for a in column_axes)
    return x.transpose(order).reshape(x.shape[0], rows, columns)


def _rest(ndim: int, axes) -> list[int]:
    return [a for a in range(ndim) if a not in axes]


def _pays(rows: int, columns: int, size: int) -> bool:
    """Checks whether T·(d + p) is at most the size of the gradient; `columns` is d + p."""
    return rows * columns <= size


def _dense(eqn: core.JaxprEqn, side: int):
    contracted, batched = eqn.params["dimension_numbers"]
    x, w, y = get_aval(eqn.invars[1 - side]), get_aval(eqn.invars[side]), get_aval(eqn.outvars[0])
    free = _rest(x.ndim, contracted[1 - side])
    rows, outputs = math.prod(x.shape[a] for a in free), w.ndim - len(contracted[side])
    inputs = math.prod(w.shape[a] for a in contracted[side])
    # With batch axes the gradient is a separate sum of outer products for each of their indices.
    if batched[0] or not _pays(rows, inputs + w.size // max(inputs, 1), w.size):
        return None
    # `dot_general` puts the free axes of its left operand first.
    columns = range(outputs) if side == 0 else range(y.ndim - outputs, y.ndim)

    def norms(operands, dy):
        part = _as_rows(operands[1 - side], free, contracted[1 - side])
        rows = _as_rows(dy, _rest(y.ndim, columns), columns)
        return length(product_squares([part], rows, pairs=True))

    return norms


def _list_taps(x: jax.Array, eqn: core.JaxprEqn) -> list[jax.Array]:
    """Lists what each tap of a kernel sees: (B, T, channels) for T output positions."""
    p, kernel, out = eqn.params, get_aval(eqn.invars[1]).shape, get_aval(eqn.outvars[0]).shape
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    order = (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    spread = [(*pad, n - 1) for pad, n in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = x.transpose(0, *(a + 1 for a in order))
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *spread, (0, 0, 0)])

    def tap(at):
        cuts = [slice(None), slice(None)]
        strides = zip(at, out_spec[2:], p["window_strides"], p["rhs_dilation"], strict=True)
        for i, n, step, apart in strides:
            cuts.append(slice(i * apart, i * apart + (out[n] - 1) * step + 1, step))
        return x[tuple(cuts)].reshape(x.shape[0], -1, x.shape[-1])

    return list(map(tap, np.ndindex(*(kernel[a] for a in rhs_spec[2:]))))


def _convolution(eqn: core.JaxprEqn, side: int):
    # If pairs of positions do not pay, the gradient is formed after all, but tap by tap, because
    # the convolution that `vmap(grad)` turns it into is slow.
    p, w, y = eqn.params, get_aval(eqn.invars[1]), get_aval(eqn.outvars[0])
    outputs, channel = w.shape[p["dimension_numbers"][1][0]], p["dimension_numbers"][2][1]
    # With groups an output sees only some of the channels, and its outer product is a block.
    grouped = p["feature_group_count"] > 1 or p["batch_group_count"] > 1
    if side != 1 or grouped or not w.size * y.size:
        return None
    pairs = _pays(y.size // outputs, w.size // outputs + outputs, w.size)

    def norms(operands, dy):
        order = [p["dimension_numbers"][2][0], *p["dimension_numbers"][2][2:]]
        rows = _as_rows(dy, order, [channel])
        return length(product_squares(_list_taps(operands[0], eqn), rows, pairs))

    return norms


def _table(eqn: core.JaxprEqn, side: int):
    dims, w, y = eqn.params["dimension_numbers"], get_aval(eqn.invars[0]), get_aval(eqn.outvars[0])
    axis = dims.collapsed_slice_dims
    whole = all(
        n == m
        for a, (n, m) in enumerate(zip(eqn.params["slice_sizes"], w.shape, strict=True))
        if a not in axis
    )
    one_axis = len(axis) == 1 and dims.start_index_map == axis and not dims.operand_batching_dims
    if side or not one_axis or not whole:
        return None
    entries, width = w.shape[axis[0]], w.size // max(w.shape[axis[0]], 1)
    looked_up = y.size // max(width, 1)
    if not _pays(looked_up, looked_up + width, w.size):
        return None

    def norms(operands, dy):
        ids = operands[1].reshape(dy.shape[0], looked_up)
        dy = _as_rows(dy, _rest(y.ndim, dims.offset_dims), dims.offset_dims)
        # Clipped ids read the first or last entry, which then gets their gradient.
        if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            return row_norms(jnp.clip(ids, 0, entries - 1), dy)
        # The gradient of an entry that does not exist is dropped.
        inside = (ids >= 0) & (ids < entries)
        return row_norms(ids, jnp.where(inside[:, :, None], dy, jnp.zeros_like(dy)))

    return norms


def _slice(eqn: core.JaxprEqn, side: int):
    def norms(operands, dy):
        return length(total(jnp.square(dy.astype(accumulator([dy])))))

    return None if side else norms


# The rule for each operation, and how many of its operands must be real numbers.
_RULES = {
    "dot_general": (_dense, 2),
    "conv_general_dilated": (_convolution, 2),
    "gather": (_table, 1),
    "dynamic_slice": (_slice, 1),
}


def _is_real(eqn: core.JaxprEqn, operands: int) -> bool:
    return all(
        jnp.issubdtype(get_aval(v).dtype, jnp.floating)
        for v in (*eqn.invars[:operands], *eqn.outvars)
    )


def _is_used_once(program: Program, uses, origin: Origin) -> bool:
    """Checks whether a parameter and each of its rearrangements are used exactly once."""
    path = [program.inputs[origin.parameter], *(slot for op in origin.chain for slot in op.outputs)]
    return all(uses[slot] == 1 for slot in path)


def find_sites(program: Program) -> list[Site]:
    """Finds the sites of a program: one per parameter that is used once, if its norm is cheap."""
    uses, found = program.uses(), []
    for op in program.ops:
        rule, operands = _RULES.get(op.eqn.primitive.name, (None, 0))
        origins = {
            i: program.origins[slot]
            for i, slot in enumerate(op.inputs)
            if isinstance(slot, int) and slot in program.origins
        }
        if rule is None or not origins or not _is_real(op.eqn, operands):
            continue
        # With parameters on both sides, one of them has the site; the other's gradient is formed.
        side, origin = min(origins.items())
        norms = rule(op.eqn, side) if _is_used_once(program, uses, origin) else None
        if norms is not None:
            found.append(Site(origin, op, side, norms))
    return found
