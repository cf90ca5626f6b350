"""What XLA's compilers for GPUs and TPUs make of a clip, beside Optax's; neither has to be there.

    uv run --group accelerators python -m tests.benchmarks.accelerators
        [gpu tpu mesh pod examples scan]  which suites; without a name all of them
        [--clips zclip ...] [--models gpt2 ...] [--hosts 1] [--forms auto]
        [--small] [--limits] [--into docs/performance.md]

A topology stands in for the devices. Nothing runs: no number here is a time on a device. Counted
are kernels, bytes per parameter (operands and results of each kernel), collectives, temporaries
relative to the gradients, on TPUs the cycles that the compiler estimates, and the CPU time that it
took beside the first row; in parentheses relative to Optax's clip of that kind, for a clip by value
to no clip.

Exit codes: 1 with `--limits` where a limit is broken or nothing was judged, 3 where the compilers
are missing.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version

import tests.benchmarks.accelerators_quiet  # noqa: F401

# isort: split
from tests.benchmarks.accelerators_cases import SMALL, SUITES, TARGETS, Case, choose_rows
from tests.benchmarks.accelerators_limits import Verdict, find_peer, judge
from tests.benchmarks.accelerators_steps import CLIPS, NONE
from tests.benchmarks.accelerators_targets import WHEELS, environment, find_missing
from tests.benchmarks.reporting import put_into, table

MISSING = 3
HOW_TO_INSTALL = """The compilers are not installed: {0}.
They are wheels of 2 GB for Linux on x86-64, and need no GPU or TPU:
    export UV_PROJECT_ENVIRONMENT=.venv-aot
    uv run --group accelerators python -m tests.benchmarks.accelerators
or pip install "jax[cuda12-local,tpu]" nvidia-cuda-nvcc-cu12"""
HEADS = {
    "kernels": "kernels",
    "loops": "loops",
    "branches": "branches",
    "all-reduces": "all-reduces",
    "all-gathers": "all-gathers",
    "others": "other collectives",
    "moved": "outputs moved",
    "bytes": "bytes per parameter",
    "temporaries": "temporaries / gradients",
    "cycles": "estimated cycles",
    "compile": "compile time / first row",
}
SAID = HEADS | {"compile": "compile time", "error": "rows that do not compile"}
COLLECTIVES = ("all-reduces", "all-gathers", "others", "moved")
RATIOS = ("kernels", "bytes", "cycles", "compile")


def main(argv=None) -> int:
    """Compiles each case, prints its table and verdicts, and returns the exit code."""
    args = _parse(argv)
    cases = _choose(args)
    missing = sorted(
        {wheel for case in cases for wheel in find_missing(TARGETS[case.target].platform)}
    )
    if missing:
        print(HOW_TO_INSTALL.format(", ".join(missing)), file=sys.stderr)
        return MISSING
    texts, verdicts = {}, []
    for case in cases:
        rows = compile_case(case, args.clips)
        found = judge(case, rows)
        text = f"### {case}\n\n{show(rows, case)}\n{say_broken(found)}"
        print(text + (f"\n{show_verdicts(found)}" if args.limits else ""), flush=True)
        texts.setdefault(case.suite, []).append(text)
        verdicts += found
    for suite, parts in texts.items() if args.into else ():
        put_into(
            args.into,
            f"accelerators {suite}",
            "\n".join([f"Compiled with {name_versions(suite)}.\n", *parts]),
        )
    print(f"All together: {count_kept(verdicts)}")
    # Nothing judged is nothing kept: a run that compiled nothing is no success.
    return int(args.limits and (not verdicts or not all(v.kept for v in verdicts)))


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "suites",
        nargs="*",
        choices=[*SUITES, []],
        metavar="suite",
        help=f"{', '.join(SUITES)}: all",
    )
    parser.add_argument(
        "--clips",
        nargs="+",
        choices=CLIPS,
        metavar="CLIP",
        help="only these, and what stands beside",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help="only cases of these models: gpt2, gpt2-2, gpt2-xl, resnet50, 70b",
    )
    parser.add_argument(
        "--hosts", nargs="+", type=int, help="only cases traced on hosts with so many devices"
    )
    parser.add_argument(
        "--forms", nargs="+", help="only these forms: auto, explicit, fsdp, shard_map"
    )
    parser.add_argument(
        "--small", action="store_true", help="GPT-2 with 2 layers, an H100 and a v5e of 2 x 2"
    )
    parser.add_argument(
        "--limits", action="store_true", help="print every limit, and fail if one is broken"
    )
    parser.add_argument(
        "--into", help="a document between whose marks the tables are put: docs/performance.md"
    )
    return parser.parse_args(argv)


def _choose(args: argparse.Namespace) -> list[Case]:
    source = SMALL if args.small else SUITES
    cases = [case for suite in args.suites or source for case in source.get(suite, ())]
    wanted = {"model": args.models, "hosts": args.hosts, "form": args.forms}
    return [
        c
        for c in cases
        if all(not values or getattr(c, name) in values for name, values in wanted.items())
    ]


def compile_case(case: Case, clips: list[str] | None) -> dict[str, dict]:
    """The rows of a case, from a process of its own: flags are read once per process."""
    names = choose_rows(case, clips, list(CLIPS))
    beside = {NONE, *(CLIPS[name].beside for name in names)}
    names = [name for name in CLIPS if name in names or name in beside]
    variables = os.environ | environment(TARGETS[case.target].platform, case.hosts)
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.accelerators_compile",
        json.dumps([case, names]),
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    # The compilers write warnings to both streams.
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = done.stderr.strip().splitlines() or [""]
    crashed = {"error": f"exit code {done.returncode}: {lines[-1]}"}
    return {name: crashed for name in names if done.returncode} | {
        k: v for rows in found for k, v in rows.items()
    }


def show(rows: dict[str, dict], case: Case) -> str:
    """The table of a case."""
    mesh, tpu = TARGETS[case.target].mesh, TARGETS[case.target].platform == "tpu"
    heads = [h for h in HEADS if (mesh or h not in COLLECTIVES) and (tpu or h != "cycles")]
    lines = []
    for name, row in rows.items():
        if "error" in row:
            error = row["error"][:200].replace("\n", " ").replace("|", "/")
            lines.append([name, f"not compiled: {error}", *[""] * (len(heads) - 1)])
        else:
            peer = rows.get(find_peer(name) or "", {})
            first = next(iter(rows.values()))
            lines.append([name, *(_cell(row, peer, first, head) for head in heads)])
    return table(["", *(HEADS[head] for head in heads)], lines)


def _cell(row: dict, peer: dict, first: dict, head: str) -> str:
    # Seconds are those of one machine on one day; beside the first row they say something.
    value = row[head] / first[head] if head == "compile" else row[head]
    text = _write(value, head)
    return f"{text} ({row[head] / peer[head]:.2f})" if head in RATIOS and peer.get(head) else text


def _write(value: float, head: str) -> str:
    if head == "temporaries":
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def count_kept(verdicts: list[Verdict]) -> str:
    """How many limits were kept."""
    return f"{sum(v.kept for v in verdicts)} of {len(verdicts)} limits kept."


def say_broken(verdicts: list[Verdict]) -> str:
    """How many limits were kept, and each that was not."""
    broken = [v for v in verdicts if not v.kept]
    lines = [f"- {v.row}: {SAID[v.column]} {_say(v)}" for v in broken]
    return "\n".join([count_kept(verdicts) + (" Broken:\n" if broken else ""), *lines]) + "\n"


def show_verdicts(verdicts: list[Verdict]) -> str:
    """Each limit and what became of it."""
    lines = [
        [
            v.row,
            SAID[v.column],
            _write(v.value, v.column),
            _write(v.most, v.column),
            "kept" if v.kept else "BROKEN",
        ]
        for v in verdicts
    ]
    return table(["", "limit on", "is", "at most", ""], lines)


def _say(verdict: Verdict) -> str:
    value, most = (_write(x, verdict.column) for x in (verdict.value, verdict.most))
    return f"{value}, at most {most}"


def name_versions(suite: str) -> str:
    """The compilers of a suite and their versions."""
    platforms = sorted({TARGETS[case.target].platform for case in SUITES[suite]})
    wheels = ["jax", *(wheel for platform in platforms for wheel in WHEELS[platform])]
    return ", ".join(f"{wheel} {version(wheel)}" for wheel in wheels)


if __name__ == "__main__":
    sys.exit(main())
