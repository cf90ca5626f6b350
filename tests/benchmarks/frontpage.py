"""The README's table of costs, quoted from docs/performance.md, and its picture of bad batches.

uv run python -m tests.benchmarks.frontpage
    [--into README.md] [--picture docs/images/bad_batches.png] [--steps 400]
"""

import argparse
import pathlib
import re
import sys
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from tests.benchmarks.reporting import publish, table

ROOT = pathlib.Path(__file__).parent.parent.parent
RATE = 4e-3  # the best one with a clip in docs/examples.md


class Quote(NamedTuple):
    """A column of a table of docs/performance.md, which becomes a row of the README's table.

    Attributes:
      label: its name in the README.
      section: the heading of the table.
      column: its number, without the column of names.
      relative: whether it is shown relative to no clip.
    """

    label: str
    section: str
    column: int
    relative: bool = False


CPU, H100, TPU = "GPT-2 small, adamw", "H100, gpt2", "v5e, gpt2"
QUOTES = (
    Quote("CPU: time, measured", CPU, 0, relative=True),
    Quote("CPU: bytes per parameter", CPU, 1),
    Quote("CPU: temporaries, in copies of the gradients", CPU, 2),
    Quote("H100: kernels", H100, 0),
    Quote("H100: bytes per parameter", H100, 3),
    Quote("TPU v5e: estimated cycles", TPU, 5, relative=True),
)
NAMES = (
    ("no clip",),
    ("Optax's global norm", "optax.clip_by_global_norm"),
    ("global norm", "clip_by_global_norm"),
)


def quote_costs(page: str) -> str:
    """Formats the table of the README. A quote whose table is missing has no row."""
    head = ["GPT-2 small with AdamW, float32", "no clip", "Optax's clip", "optaxclip's"]
    rows = [[quote.label, *numbers] for quote in QUOTES if (numbers := read(page, quote))]
    return table(head, rows)


def read(page: str, quote: Quote) -> list[str]:
    """Reads three numbers: no clip, Optax's clip and ours. The list is empty without the table."""
    _, _, text = page.partition(f"### {quote.section}, float32 gradients\n")
    section = re.split(r"^#|^<!", text, flags=re.MULTILINE)[0]
    found = dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE))
    cells = [found[name].split(" | ") for names in NAMES for name in names if name in found]
    if len(cells) < len(NAMES):
        return []
    texts = [row[quote.column].split()[0].replace(",", "") for row in cells]
    # A number with a sign is a difference from the first row.
    values = [float(text) + float(texts[0]) * (text[0] in "+-") for text in texts]
    if quote.relative:
        return [f"{value / values[0]:.2f}" for value in values]
    return [f"{value:,.1f}".removesuffix(".0") for value in values]


def draw(path: str, steps: int) -> None:
    """Draws the loss of `examples/transformer.py` on good batches, with and without a clip."""
    sys.path.insert(0, str(ROOT / "examples"))
    import comparison
    import data
    import transformer

    text, runs = data.load_text(), {}
    for name in ("no clip", "global norm 1"):
        task = transformer.make_task(transformer.METHODS[name], *text)
        seen = comparison.train(name, task, [RATE], 1, steps).seen
        runs[name] = {key: x[0, 0] for key, x in seen.items()}
    # Both runs have the same batches. The norm of a bad one is about a thousand times larger.
    norms = runs["global norm 1"]["clip/grad_norm"]
    bad = np.flatnonzero(norms > 50 * np.median(norms))
    fig, ax = plt.subplots(figsize=(7.5, 3), layout="constrained")
    looks = {"no clip": ("0.55", "without a clip"), "global norm 1": ("C0", "clipped to norm 1")}
    for name, (color, label) in looks.items():
        where, loss = smooth(runs[name]["loss"], bad)
        ax.plot(where, loss, color=color, linewidth=1.8)
        ax.text(steps * 1.01, loss[-1], label, color=color, va="center")
    for step in bad:
        ax.axvline(step, color="C3", linewidth=0.9, linestyle=":", zorder=0)
    for step in bad[:1]:
        ax.text(step - 3, ax.get_ylim()[1], "bad batches", color="C3", ha="right", va="top")
    ax.set(xlabel="step", ylabel="loss, nats per character", xlim=(0, steps))
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)


def smooth(loss: np.ndarray, bad: np.ndarray, width: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of good batches, and the running median of their losses."""
    good = np.setdiff1d(np.arange(len(loss)), bad)
    windows = np.lib.stride_tricks.sliding_window_view(loss[good], width)
    return good[width // 2 : -(width // 2)], np.median(windows, axis=1)


def main(argv=None) -> None:
    """Prints the table, writes it into a document, and draws the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", help="document to write the table into: README.md")
    parser.add_argument("--picture", help="file for the picture")
    parser.add_argument("--steps", type=int, default=400, help="steps of the runs in the picture")
    args = parser.parse_args(argv)
    text = quote_costs((ROOT / "docs/performance.md").read_text())
    publish(text, args.into, "cost")
    if args.picture:
        draw(args.picture, args.steps)


if __name__ == "__main__":
    main()
