"""How often `diagnose` is right: writes a table into docs/watching.md.

    python -m tests.benchmarks.diagnosis [--seeds 200]

Each way to fail, or to be healthy, of `tests/catalogue.py` is drawn with so many seeds. The column
"before" is of the first `diagnose`, which looked at the whole run only. It is kept in a file, which

    git worktree add FOLDER c19c444^
    python -m tests.benchmarks.diagnosis --before FOLDER

writes. A second table is of windows of the healthy runs, cut out at every place.
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

from tests.benchmarks.reporting import put_into, table
from tests.catalogue import CASES, HEALTHY, SILENT, WINDOWS, windows_of

BEFORE = pathlib.Path(__file__).with_name("diagnosis_before.json")


def load(folder: str):
    """The package as it is in a checkout."""
    path = pathlib.Path(folder, "optaxclip", "__init__.py")
    spec = importlib.util.spec_from_file_location("optaxclip", path)
    assert spec and spec.loader, path
    module = sys.modules["optaxclip"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(name: str, seed: int):
    """A run of a case; no two cases share their seeds."""
    return CASES[name].draw(np.random.default_rng([seed, zlib.crc32(name.encode())]))


def count(diagnose: Callable, name: str, seeds: int) -> tuple[Counter, Counter]:
    """What is named first, how often; and what is wrongly named at all, or with another block."""
    first, wrong = Counter(), Counter()
    for seed in range(seeds):
        signs = diagnose(draw(name, seed))
        first[signs[0].name if signs else SILENT] += 1
        wrong.update(sign.name for sign in signs if sign.name in CASES[name].never)
        if CASES[name].block and (not signs or signs[0].block != "layers/3"):
            wrong["another block"] += 1
    return first, wrong


def count_first(diagnose: Callable, name: str, seeds: int) -> Counter:
    """What is named first, how often."""
    signs = [diagnose(draw(name, seed)) for seed in range(seeds)]
    return Counter(found[0].name if found else SILENT for found in signs)


def describe(first: dict[str, int], expected: str) -> str:
    """How often it was right, and what was named most where it was not."""
    share = f"{first.get(expected, 0) / sum(first.values()):.0%}"
    others = {key: n for key, n in first.items() if key != expected}
    return f"{share}, {max(others, key=lambda key: others[key])}" if others else share


def row(diagnose: Callable, name: str, seeds: int, before: dict[str, int]) -> list[str]:
    """A line of the table."""
    case, (first, wrong) = CASES[name], count(diagnose, name, seeds)
    others = [f"{key} {n}" for key, n in first.most_common() if key != case.first]
    mistakes = ", ".join(others + [f"{key} {n}" for key, n in wrong.most_common()])
    right = f"{first[case.first] / seeds:.1%}"
    return [name, case.first, describe(before, case.first), right, mistakes]


def window_row(diagnose: Callable, name: str, seeds: int) -> list[str]:
    """A line of the table of windows of a healthy run."""
    found = [diagnose(window) for seed in range(seeds) for window in windows_of(draw(name, seed))]
    wrong = Counter(sign.name for signs in found for sign in signs)
    silent = sum(not signs for signs in found) / len(found)
    return [name, f"{silent:.1%}", ", ".join(f"{key} {n}" for key, n in wrong.most_common())]


def main() -> None:
    """Counts, and writes the table."""
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
    text = table(head, [row(diagnose, name, seeds, before[name]) for name in CASES])
    print(text)
    put_into("docs/watching.md", "diagnosis", text)
    rows = [window_row(diagnose, name, seeds) for name in HEALTHY]
    text = table(["windows of", "nothing said", f"signs, in {len(WINDOWS) * seeds} windows"], rows)
    print(text)
    put_into("docs/watching.md", "diagnosis windows", text)


if __name__ == "__main__":
    main()
