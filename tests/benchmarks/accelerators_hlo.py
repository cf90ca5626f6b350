"""What a compiled program does, read from XLA's text of it: kernels, bytes, collectives, loops.

`cost_analysis` is not used: it is empty for GPU executables. The text is there on every platform.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

COLLECTIVES = {
    "all-reduce": "all-reduces",
    "all-gather": "all-gathers",
    "all-to-all": "others",
    "ragged-all-to-all": "others",
    "reduce-scatter": "others",
    "collective-permute": "others",
    "collective-broadcast": "others",
}
# Names for buffers: nothing is launched and nothing moves.
NAMES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id"),
}
CALLS = {"while", "conditional", "call", "async-start"}
COUNTS = ("kernels", "loops", "branches", "all-reduces", "all-gathers", "others", "cycles", "bytes")
WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # of all others the name ends in the bits


class Instruction(NamedTuple):
    """One line of a computation."""

    result: str
    opcode: str
    operands: str
    attributes: str


def count(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What one call of a program does; the body of a loop and each branch count once."""
    computations, entry = parse(compiled.as_text())
    totals, seen, pending = dict.fromkeys(COUNTS, 0), set(), [(entry, True)]
    while pending:
        name, launched = pending.pop()
        if (name, launched) in seen or name not in computations:
            continue
        seen.add((name, launched))
        for instruction in computations[name].values():
            _add(totals, instruction, computations[name], launched)
            pending += [
                (called, launched and instruction.opcode in CALLS)
                for called in called_by(instruction)
            ]
    return totals


def _add(totals: dict[str, int], instruction: Instruction, others: dict, launched: bool) -> None:
    """Adds one instruction; of what stands inside a kernel only its collectives."""
    opcode = _undone(instruction.opcode)
    if opcode in COLLECTIVES:
        totals[COLLECTIVES[opcode]] += 1
    if not launched:
        return
    totals["loops"] += opcode == "while"
    totals["branches"] += opcode == "conditional"
    totals["cycles"] += sum(
        map(int, re.findall(r'estimated_cycles":"(\d+)', instruction.attributes))
    )
    # A start that is no collective is a prefetch: what it brings is counted where it is read.
    moves = opcode in COLLECTIVES or not opcode.endswith(("-start", "-done"))
    if moves and opcode not in NAMES | CALLS:
        totals["kernels"] += 1
        totals["bytes"] += bytes_moved(instruction, others)


def bytes_moved(instruction: Instruction, others: dict[str, Instruction]) -> int:
    """Bytes that one instruction reads and writes, given all of its computation."""
    # A product of an array with itself names it twice, unless it is in a fusion.
    names = set(re.findall(r"[\w.\-]+", instruction.operands))
    read = sum(measure(others[name].result) for name in names if name in others)
    return measure(instruction.result) + read


def _undone(opcode: str) -> str:
    """The collective that an instruction starts, or the opcode as it is."""
    started = opcode.removesuffix("-start")
    return started if started in COLLECTIVES else opcode


def called_by(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    keys = "body|condition|to_apply|calls|true_computation|false_computation"
    found = re.findall(rf"\b(?:{keys})=%?([\w.\-]+)", instruction.attributes)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes):
        found += re.findall(r"[\w.\-]+", branches)
    return found


def measure(result: str) -> int:
    """Bytes of a type such as `f32[768,3072]{1,0}` or a tuple of such."""
    arrays = re.findall(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]", result)
    return sum(
        _width(kind) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays
    )


def _width(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return WIDTHS.get(kind) or max(int(bits.group()) // 8 if bits else 0, 1)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """All computations of a module, by name, and the name of the one that is called."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head:
            name = head.group(2)
            entry = name if head.group(1) else entry
            computations[name] = {}
        elif line.startswith("  ") and name:
            computations[name].update(_parse_line(re.sub(r"/\*.*?\*/", "", line)))
    return computations, entry


def _parse_line(line: str) -> Iterator[tuple[str, Instruction]]:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head:
        # Types nest, and layouts of TPUs have parentheses of their own: {1,0:T(8,128)}.
        start = head.end()
        stop = _close(line, start) if line[start] == "(" else line.index(" ", start)
        opening = line.index("(", stop)
        closing = _close(line, opening)
        opcode = line[stop:opening].strip()
        yield (
            head.group(1),
            Instruction(line[start:stop], opcode, line[opening:closing], line[closing:]),
        )


def _close(line: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            return place + 1
    return len(line)
