"""How long a poisoned clip takes to be useful again: writes docs/robustness.md.

    uv run python -m tests.benchmarks.robustness [--peers FOLDER]

With `--peers` the public implementations run on the same series, from clones in that folder (ZClip,
autoclip, OLMo-core, maxtext), where PyTorch is installed.
"""

import argparse
import warnings

import jax
import numpy as np
from tqdm import tqdm

import optaxclip
from tests.benchmarks.peers import PEERS
from tests.cases import ADAPTIVE
from tests.series import POISONS, factors, gradients, near, steps_to_recover

STEPS = 1200
HEAD = f"""# Robustness

What has a history can be poisoned, or locked out for ever. Each adaptive clip is run on gradients
whose norms are log-normal (a deviation of 0.3 in the logarithm); at step 100, or in the very first
one, something happens. The table says after how many steps the bound is back, for good, within a
factor of 3 of the bound of the run in which nothing happened (after a lasting rise or fall: of that
bound times 100, or by 100).

- 1, 10, 200 NaN; NaN first: that many gradients of NaN; ten of them in the very first steps.
- infinity: one gradient of infinities.
- 50 zeros: gradients of zeros; first: in the very first steps.
- spike: one gradient 10⁶ times as long; first: the very first one.
- rise, fall: from there on all gradients are 100 times as long, or as short.

A test holds every clip to its number in `tests/cases.py`, for the tree as a whole and leaf by leaf,
and none may keep a NaN in its state. Written by `python -m tests.benchmarks.robustness` (jax
{jax.__version__}).

## This library

"""
TAIL = """
Read it so: after NaN and infinities the bound is where it was, because nothing was learned. What is
1 to 100 under "NaN first" and "50 zeros first" is the warm-up, which waits for real gradients. A
spike in the very first step is learned by whatever averages, and takes the memory of the average to
forget: 900 steps at decay 0.99. `adagc` follows a lasting rise by 0.1 % a step, its paper's rule;
`relearn_after=` makes it learn again.
"""
PEER_HEAD = """
## Public implementations, the same series

Run from their repositories as they were in November 2026; "never" is: not within the {steps} steps
of the run.

"""


def table(rows: dict[str, list[float]]) -> str:
    """A table in Markdown, one row a method."""

    def cell(steps):
        return "never" if np.isinf(steps) else str(int(steps))

    lines = ["| | " + " | ".join(POISONS) + " |", "|---|" + "---|" * len(POISONS)]
    lines += [f"| {name} | " + " | ".join(map(cell, row)) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def ours() -> dict[str, list[float]]:
    """The steps that each of our clips takes: the longer of tree and leaf scope."""
    rows = {}
    for case in tqdm(ADAPTIVE, desc="this library"):
        found = [
            steps_to_recover(case.make(scope=scope), 600 + case.within, case.relative)
            for scope in (optaxclip.scopes.tree, optaxclip.scopes.leaf)
        ]
        rows[f"`{case.name}`"] = [max(f[poison][0] for f in found) for poison in POISONS]
    return rows


def theirs(folder: str) -> dict[str, list[float]]:
    """The same for public implementations."""
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
    parser.add_argument("--peers", help="a folder with clones of the public implementations")
    parser.add_argument("--out", default="docs/robustness.md")
    args = parser.parse_args()
    text = HEAD + table(ours()) + TAIL
    if args.peers:
        text += PEER_HEAD.format(steps=STEPS) + table(theirs(args.peers))
    with open(args.out, "w") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
