"""The process that compiles one case; `accelerators` starts it with the flags of its platform.

    python -m tests.benchmarks.accelerators_compile '[[case], [rows]]'

Lines of its output that begin with `{` are rows, as JSON: those before a crash are not lost.
"""

import json
import sys
import time
from typing import Any

import jax

from tests.benchmarks.accelerators_cases import TARGETS, Case
from tests.benchmarks.accelerators_hlo import count
from tests.benchmarks.accelerators_limits import keep_best
from tests.benchmarks.accelerators_steps import CPU, MAPPED, OURS, PLAIN, Program, build
from tests.benchmarks.accelerators_targets import Placement, place


def main(argument: str) -> None:
    """Compiles the rows of a case one after the other."""
    fields, names = json.loads(argument)
    case = Case(*fields)
    placement, host = place(TARGETS[case.target], case.form), Placement(None, jax.devices("cpu")[0])

    def measure(name: str) -> dict:
        # Also for the CPU, whose ratios are the limit of this suite.
        where = host if name.endswith(CPU) else placement
        return account(build(case, name.removesuffix(CPU), where), where)

    if case.suite == "examples":
        names = [name + where for where in ("", CPU) for name in (PLAIN, MAPPED, OURS)]
    # The first compilation of a process also starts the compiler.
    jax.jit(lambda x: x + 1).lower(
        jax.ShapeDtypeStruct((8, 128), "float32", sharding=placement.shard())
    ).compile()
    rows = {}
    for name in names:
        try:
            rows[name] = measure(name)
        except Exception as error:  # that one clip does not compile is a result, too
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"\n{json.dumps({name: rows[name]})}", flush=True)
    keep_best(rows, measure, case)
    print(f"\n{json.dumps(rows)}")


def account(program: Program, placement: Placement) -> dict[str, float]:
    """What the compiler makes of a program."""
    # Otherwise the second clip of a kind would be traced from what the first left.
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(program.step, donate_argnums=program.donated).lower(*program.arguments)
    compiled = lowered.compile()
    seconds = time.process_time() - start
    found = count(compiled)
    # A program is that of one device; a mesh moves as many times what it does.
    devices = placement.mesh.size if placement.mesh else 1
    found["bytes"] *= devices / program.parameters
    temporaries = compiled.memory_analysis().temp_size_in_bytes / program.gradients
    moved = _count_moved(compiled, program) if placement.mesh else 0
    return found | {"moved": moved, "temporaries": temporaries, "compile": seconds}


def _count_moved(compiled: jax.stages.Compiled, program: Program) -> int:
    """How many parameters and moments leave a step on other devices than they entered it."""
    params = jax.tree.structure(program.arguments[0])

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree) == params

    before = jax.tree.leaves(program.arguments[: len(program.donated)], is_leaf=like_params)
    after = jax.tree.leaves(compiled.output_shardings, is_leaf=like_params)
    pairs = [
        pair
        for x, sharding in zip(before, after, strict=True)
        if like_params(x)
        for pair in zip(jax.tree.leaves(x), jax.tree.leaves(sharding), strict=True)
    ]
    return sum(not x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs)


if __name__ == "__main__":
    main(sys.argv[1])
