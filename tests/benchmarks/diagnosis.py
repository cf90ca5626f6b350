"""How often `diagnose` is right: writes two tables into docs/watching.md.

    python -m tests.benchmarks.diagnosis [--seeds 200]

Each case of `tests/catalogue.py`, a way to fail or to be healthy, is drawn with many seeds. The
column "before" shows the first version of `diagnose`, which looked only at the run as a whole. Its
results are kept in a file, written by

    git worktree add FOLDER c19c444^
    python -m tests.benchmarks.diagnosis --before FOLDER

A second table counts the signs in windows of the healthy runs, taken at several places.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np

from tests.benchmarks.reporting import publish, table
from tests.catalogue import CASES, HEALTHY, SILENT, WINDOWS, windows_of

BEFORE = pathlib.Path(__file__).with_name("diagnosis_before.json")


def load(folder: str):
    """Imports the package from a checkout."""
    path = pathlib.Path(folder, "optaxclip", "__init__.py")
    spec = importlib.util.spec_from_file_location("optaxclip", path)
    assert spec and spec.loader, path
    module = sys.modules["optaxclip"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(name: str, seed: int):
    """Draws a run of a case. No two cases share random numbers."""
    return CASES[name].draw(np.random.default_rng([seed, zlib.crc32(name.encode())]))


def count(diagnose: Callable, name: str, seeds: int) -> tuple[Counter, Counter]:
    """Counts which sign comes first, and which signs are wrong or name another block."""
    first, wrong = Counter(), Counter()
    for seed in range(seeds):
        signs = diagnose(draw(name, seed))
        first[signs[0].name if signs else SILENT] += 1
        wrong.update(sign.name for sign in signs if sign.name in CASES[name].never)
        if CASES[name].block and (not signs or signs[0].block != "layers/3"):
            wrong["another block"] += 1
    return first, wrong


def count_first(diagnose: Callable, name: str, seeds: int) -> Counter:
    """Counts which sign comes first."""
    signs = [diagnose(draw(name, seed)) for seed in range(seeds)]
    return Counter(found[0].name if found else SILENT for found in signs)


def describe(first: dict[str, int], expected: str) -> str:
    """Says how often the first sign was right, and which other one was most frequent."""
    share = f"{first.get(expected, 0) / sum(first.values()):.0%}"
    others = {key: n for key, n in first.items() if key != expected}
    return f"{share}, {max(others, key=lambda key: others[key])}" if others else share


def make_row(diagnose: Callable, name: str, seeds: int, before: dict[str, int]) -> list[str]:
    """Makes the row of a case."""
    case = CASES[name]
    first, wrong = count(diagnose, name, seeds)
    others = [f"{key} {n}" for key, n in first.most_common() if key != case.first]
    mistakes = ", ".join(others + [f"{key} {n}" for key, n in wrong.most_common()])
    right = f"{first[case.first] / seeds:.1%}"
    return [name, case.first, describe(before, case.first), right, mistakes]


def make_window_row(diagnose: Callable, name: str, seeds: int) -> list[str]:
    """Makes the row of the windows of a healthy run."""
    found = [diagnose(window) for seed in range(seeds) for window in windows_of(draw(name, seed))]
    wrong = Counter(sign.name for signs in found for sign in signs)
    silent = sum(not signs for signs in found) / len(found)
    return [name, f"{silent:.1%}", ", ".join(f"{key} {n}" for key, n in wrong.most_common())]


def main() -> None:
    """Writes the tables, or the results of an older version."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--before", metavar="FOLDER")
    args = parser.parse_args()
    diagnose = load(args.before or ".").diagnose
    if args.before:
        counts = {name: count_first(diagnose, name, args.seeds) for name in CASES}
        BEFORE.write_text(json.dumps(counts, indent=1) + "\n")
        return
    before, seeds = json.loads(BEFORE.read_text()), args.seeds
    head = ["run", "right answer", "before", "now", f"other signs, of {seeds}"]
    text = table(head, [make_row(diagnose, name, seeds, before[name]) for name in CASES])
    publish(text, "docs/watching.md", "diagnosis")
    rows = [make_window_row(diagnose, name, seeds) for name in HEALTHY]
    text = table(["windows of", "nothing said", f"signs, in {len(WINDOWS) * seeds} windows"], rows)
    publish(text, "docs/watching.md", "diagnosis windows")


if __name__ == "__main__":
    main()
