"""How many steps a clip takes to recover from bad norms: the tables of docs/robustness.md.

    uv run python -m tests.benchmarks.robustness --into docs/robustness.md [--peers FOLDER]

With `--peers` public implementations run on the same series, from clones in that folder (ZClip,
autoclip, OLMo-core, maxtext). They need PyTorch.
"""

import argparse
import warnings

import numpy as np
from tqdm import tqdm

import optaxclip
from tests.benchmarks.peers import PEERS
from tests.benchmarks.reporting import publish, table
from tests.cases import ADAPTIVE
from tests.series import POISONS, factors, gradients, near, steps_to_recover

STEPS = 1200


def format_table(rows: dict[str, list[float]]) -> str:
    """Formats a table with one row per method."""

    def format_cell(steps):
        return "never" if np.isinf(steps) else str(int(steps))

    return table(["", *POISONS], [[name, *map(format_cell, row)] for name, row in rows.items()])


def measure_ours() -> dict[str, list[float]]:
    """Measures the steps that our clips take: the larger number of tree and leaf scope."""
    rows = {}
    for case in tqdm(ADAPTIVE, desc="this library"):
        found = [
            steps_to_recover(case.make(scope=scope), 600 + case.within, case.relative)
            for scope in (optaxclip.scopes.tree, optaxclip.scopes.leaf)
        ]
        rows[f"`{case.name}`"] = [max(f[poison][0] for f in found) for poison in POISONS]
    return rows


def measure_peers(folder: str) -> dict[str, list[float]]:
    """Measures the steps that public implementations take."""
    grads = gradients(STEPS)
    norms = np.sqrt(sum(np.sum(np.square(g.reshape(STEPS, -1)), axis=1) for g in grads.values()))
    rows = {}
    for name, make in tqdm(PEERS.items(), desc="public implementations"):
        step = make(folder)
        clean = np.array([step(n) for n in norms])
        rows[name] = []
        for poison in POISONS.values():
            step = make(folder)
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                bounds = np.array([step(n) for n in norms * factors(poison, STEPS)])
            rows[name].append(near(bounds[:, None], clean[:, None] * poison.lasting, poison))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="folder with clones of the public implementations")
    parser.add_argument("--into", help="document to write the tables into")
    args = parser.parse_args()
    publish(format_table(measure_ours()), args.into, "ours")
    if args.peers:
        publish(format_table(measure_peers(args.peers)), args.into, "public")


if __name__ == "__main__":
    main()
