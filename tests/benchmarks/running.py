"""What a compiled program runs, read from XLA's text of it.

`cost_analysis` adds up both branches of a `cond`. Here each counts as its cheaper branch: the other
one of a clip, which looks again at norms beyond the squares of floats, costs nothing until such a
norm comes.
"""

import re
from collections.abc import Callable

import jax

from tests.benchmarks.accelerators_hlo import CALLS, NAMES, Instruction, called_by, measure, parse


def count_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that the kernels of a program read and write."""

    def moved(instruction: Instruction, others: dict[str, Instruction]) -> int:
        if instruction.opcode in NAMES | CALLS:
            return 0
        read = re.findall(r"[\w.\-]+", instruction.operands)
        return measure(instruction.result) + sum(
            measure(others[name].result) for name in read if name in others
        )

    return _total(compiled, moved)


def count_all_reduces(compiled: jax.stages.Compiled) -> int:
    """All-reduces of a program."""
    return _total(
        compiled,
        lambda instruction, others: instruction.opcode in ("all-reduce", "all-reduce-start"),
    )


def _total(
    compiled: jax.stages.Compiled, weigh: Callable[[Instruction, dict[str, Instruction]], int]
) -> int:
    """The sum of the weights of all instructions that run; the body of a loop counts once."""
    computations, entry = parse(compiled.as_text())

    def total_of(name: str) -> int:
        return sum(
            weigh_all(instruction, computations[name])
            for instruction in computations[name].values()
        )

    def weigh_all(instruction: Instruction, others: dict[str, Instruction]) -> int:
        own = weigh(instruction, others)
        if instruction.opcode not in CALLS:
            return own
        inner = [total_of(name) for name in called_by(instruction)]
        return own + (min(inner) if instruction.opcode == "conditional" else sum(inner))

    return total_of(entry)
