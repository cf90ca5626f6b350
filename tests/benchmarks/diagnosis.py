"""How often `diagnose` is right: writes a table into docs/watching.md.

    python -m tests.benchmarks.diagnosis [--seeds 200]

Each way to fail, or to be healthy, of `tests/catalogue.py` is drawn with so many seeds.
"""

import argparse
import zlib
from collections import Counter

import numpy as np

import optaxclip
from tests.benchmarks.reporting import put_into, table
from tests.catalogue import CASES, SILENT


def draw(name: str, seed: int):
    """A run of a case; no two cases share their seeds."""
    return CASES[name].draw(np.random.default_rng([seed, zlib.crc32(name.encode())]))


def count(name: str, seeds: int) -> tuple[Counter, Counter]:
    """What is named first, how often; and what is wrongly named at all, or with another block."""
    first, wrong = Counter(), Counter()
    for seed in range(seeds):
        signs = optaxclip.diagnose(draw(name, seed))
        first[signs[0].name if signs else SILENT] += 1
        wrong.update(sign.name for sign in signs if sign.name in CASES[name].never)
        if CASES[name].block and (not signs or signs[0].block != "layers/3"):
            wrong["another block"] += 1
    return first, wrong


def row(name: str, seeds: int) -> list[str]:
    """A line of the table."""
    case, (first, wrong) = CASES[name], count(name, seeds)
    others = [f"{key} {n}" for key, n in first.most_common() if key != case.first]
    mistakes = ", ".join(others + [f"{key} {n}" for key, n in wrong.most_common()])
    return [name, case.first, f"{first[case.first] / seeds:.1%}", mistakes]


def main() -> None:
    """Counts, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    head = ["run", "named first", "of all seeds", f"else, or beside it, of {seeds}"]
    text = table(head, [row(name, seeds) for name in CASES])
    print(text)
    put_into("docs/watching.md", "diagnosis", text)


if __name__ == "__main__":
    main()
