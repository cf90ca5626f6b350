"""What a compiled program runs, read from XLA's text.

`cost_analysis` adds up both branches of a `cond`. Here a `cond` counts as its cheaper branch. In a
clip the other branch runs only for norms whose square overflows or underflows.
"""

from collections.abc import Callable

import jax

from tests.benchmarks.accelerators_hlo import (
    CALLS,
    NAMES,
    Instruction,
    bytes_moved,
    called_by,
    parse,
)


def count_bytes(compiled: jax.stages.Compiled) -> int:
    """Counts the bytes that the kernels of a program read and write."""

    def count(instruction: Instruction, others: dict[str, Instruction]) -> int:
        return 0 if instruction.opcode in NAMES | CALLS else bytes_moved(instruction, others)

    return _sum_weights(compiled, count)


def count_all_reduces(compiled: jax.stages.Compiled) -> int:
    """Counts the all-reduces of a program."""

    def count(instruction: Instruction, others: dict[str, Instruction]) -> int:
        return instruction.opcode in ("all-reduce", "all-reduce-start")

    return _sum_weights(compiled, count)


def _sum_weights(
    compiled: jax.stages.Compiled, weigh: Callable[[Instruction, dict[str, Instruction]], int]
) -> int:
    """Sums the weights of all instructions that run. The body of a loop counts once."""
    computations, entry = parse(compiled.as_text())

    def sum_computation(name: str) -> int:
        instructions = computations[name]
        return sum(sum_calls(instruction, instructions) for instruction in instructions.values())

    def sum_calls(instruction: Instruction, others: dict[str, Instruction]) -> int:
        own = weigh(instruction, others)
        if instruction.opcode not in CALLS:
            return own
        inner = [sum_computation(name) for name in called_by(instruction)]
        return own + (min(inner) if instruction.opcode == "conditional" else sum(inner))

    return sum_computation(entry)
