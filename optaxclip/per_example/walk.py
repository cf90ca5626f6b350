"""A loss as a flat list of operations, and which of them takes which parameter.

The loss is traced for one example. A jitted function that takes a parameter is inlined, to expose
the use inside it; everything else (loops, custom derivatives, rematerialization) stays one
operation. Running the list runs the loss. Nothing here depends on a framework.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from optaxclip.compat import bind

# Linear operations whose transpose keeps the length: the gradient of the input has the same norm as
# that of the output.
_KEEP_LENGTH = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "squeeze",
    "transpose",
}


def get_aval(var: Any) -> Any:
    """Returns the shape and dtype of a variable or literal of a jaxpr."""
    return var.aval


class Op(NamedTuple):
    """One operation: inputs are slots (numbers) and literals, outputs are slots."""

    eqn: core.JaxprEqn
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]

    def __call__(self, *values):
        """Runs the operation and returns its results as a list."""
        # Restores the mesh and compute type from tracing, like JAX's own interpreter.
        with self.eqn.ctx.manager:
            out = bind(self.eqn, values)
        return out if self.eqn.primitive.multiple_results else [out]

    @property
    def slots(self) -> list[int]:
        return [i for i in self.inputs if isinstance(i, int)]


class Origin(NamedTuple):
    """Where a rearranged parameter comes from: its index, and the operations on it."""

    parameter: int
    chain: tuple[Op, ...]

    def __call__(self, value):
        for op in self.chain:
            (value,) = op(value)
        return value


class Program(NamedTuple):
    """A loss as a flat list of operations.

    Attributes:
      ops: the operations that the results need.
      inputs: the slots of the arguments; parameters come first.
      outputs: the slots (or literals) of the results.
      constants: the values that the loss closes over, by slot.
      origins: where parameters and rearranged parameters come from, by slot.
    """

    ops: list[Op]
    inputs: list[int]
    outputs: list[Any]
    constants: dict[int, Any]
    origins: dict[int, Origin]

    def uses(self) -> Counter:
        """Counts how often each slot is read."""
        # A result counts as a use: a parameter that is in aux or is the loss has a gradient there.
        return Counter(i for op in self.ops for i in op.slots) + Counter(
            i for i in self.outputs if isinstance(i, int)
        )

    def run(self, arguments: Iterable[Any], at: Callable[[Op, list, list], list]) -> list[Any]:
        """Runs the program and returns its results.

        `at(op, operands, results)` sees every operation, and returns its results or replacements.
        """
        values = self.constants | dict(zip(self.inputs, arguments, strict=True))

        def read(i):
            return values[i] if isinstance(i, int) else i.val

        for op in self.ops:
            operands = list(map(read, op.inputs))
            values.update(zip(op.outputs, at(op, operands, op(*operands)), strict=True))
        return list(map(read, self.outputs))


def _keeps_length(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name not in _KEEP_LENGTH or len(eqn.invars) != 1:
        return False
    before, after = get_aval(eqn.invars[0]), get_aval(eqn.outvars[0])
    real = jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)
    # A broadcast to more elements uses each element several times, and the gradients add up.
    return real and (before.size == after.size or eqn.primitive.name == "slice")


class _Flattener:
    def __init__(self):
        self.ops, self.constants, self.origins = [], {}, {}
        self.slot = itertools.count().__next__

    def constant(self, value) -> int:
        slot = self.slot()
        self.constants[slot] = value
        return slot

    def walk(self, closed: core.ClosedJaxpr, inputs: Iterable[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        slots = dict(zip(jaxpr.constvars, map(self.constant, closed.consts), strict=True))
        slots.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var):
            return var if isinstance(var, core.Literal) else slots[var]

        for eqn in jaxpr.eqns:
            slots.update(
                zip(eqn.outvars, self.step(eqn, tuple(map(read, eqn.invars))), strict=True)
            )
        return list(map(read, jaxpr.outvars))

    def step(self, eqn: core.JaxprEqn, inputs: tuple[Any, ...]) -> Iterable[Any]:
        origins = [self.origins.get(i) if isinstance(i, int) else None for i in inputs]
        # Both are names of one primitive, which JAX has renamed.
        if eqn.primitive.name in ("jit", "pjit") and any(origins):
            return self.walk(eqn.params["jaxpr"], inputs)
        op = Op(eqn, inputs, tuple(self.slot() for _ in eqn.outvars))
        self.ops.append(op)
        if _keeps_length(eqn) and origins[0] is not None:
            self.origins[op.outputs[0]] = Origin(origins[0].parameter, (*origins[0].chain, op))
        return op.outputs


def _drop_unused(ops: list[Op], outputs: list[Any]) -> list[Op]:
    """Keeps the operations that the outputs need, and those with effects."""
    needed, kept = {i for i in outputs if isinstance(i, int)}, []
    for op in reversed(ops):
        # An operation with an effect (a debug print, a check) is kept for its effect.
        if op.eqn.effects or not needed.isdisjoint(op.outputs):
            needed.update(op.slots)
            kept.append(op)
    return kept[::-1]


def flatten(closed: core.ClosedJaxpr, parameters: int) -> Program:
    """Flattens a traced loss whose first arguments are the parameters into a program."""
    flat = _Flattener()
    inputs = [flat.slot() for _ in closed.jaxpr.invars]
    flat.origins.update({slot: Origin(i, ()) for i, slot in enumerate(inputs[:parameters])})
    outputs = flat.walk(closed, inputs)
    return Program(_drop_unused(flat.ops, outputs), inputs, outputs, flat.constants, flat.origins)
