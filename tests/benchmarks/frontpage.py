"""The first page: what a clip costs, as docs/performance.md has it, and a run with bad batches.

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
RATE = 4e-3  # in docs/examples.md the best with a clip


class Quote(NamedTuple):
    """A column of one table of docs/performance.md.

    Attributes:
      what: what it is, on the first page.
      section: the heading of the table.
      column: which, the names not counted.
      times: whether it is shown beside no clip.
    """

    what: str
    section: str
    column: int
    times: bool = False


CPU, H100, TPU = "GPT-2 small, adamw", "H100, gpt2", "v5e, gpt2"
QUOTES = (
    Quote("CPU: time, measured", CPU, 0, times=True),
    Quote("CPU: bytes per parameter", CPU, 1),
    Quote("CPU: temporaries, in copies of the gradients", CPU, 2),
    Quote("H100: kernels", H100, 0),
    Quote("H100: bytes per parameter", H100, 3),
    Quote("TPU v5e: estimated cycles", TPU, 5, times=True),
)
NAMES = (
    ("no clip",),
    ("Optax's global norm", "optax.clip_by_global_norm"),
    ("global norm", "clip_by_global_norm"),
)


def cost(page: str) -> str:
    """The table of the first page. What has not been written yet has no row."""
    rows = [[quote.what, *numbers] for quote in QUOTES if (numbers := read(page, quote))]
    return table(
        ["GPT-2 small with AdamW, float32", "no clip", "Optax's clip", "optaxclip's"], rows
    )


def read(page: str, quote: Quote) -> list[str]:
    """The numbers of a quote: without a clip, with Optax's, with ours; none without the table."""
    _, _, text = page.partition(f"### {quote.section}, float32 gradients\n")
    found = dict(
        re.findall(r"^\| (.+?) \| (.+) \|$", re.split(r"^#|^<!", text, flags=re.M)[0], re.M)
    )
    cells = [found[name].split(" | ") for names in NAMES for name in names if name in found]
    if len(cells) < len(NAMES):
        return []
    texts = [row[quote.column].split()[0].replace(",", "") for row in cells]
    # With a sign it stands beside the first row.
    values = [float(text) + float(texts[0]) * (text[0] in "+-") for text in texts]
    if quote.times:
        return [f"{value / values[0]:.2f}" for value in values]
    return [f"{value:,.1f}".removesuffix(".0") for value in values]


def draw(path: str, steps: int) -> None:
    """The loss of `examples/transformer.py` on good batches, with a clip and without."""
    sys.path.insert(0, str(ROOT / "examples"))
    import comparison
    import data
    import transformer

    text, runs = data.library_text(), {}
    for name in ("no clip", "global norm 1"):
        task = transformer.task(transformer.METHODS[name], *text)
        seen = comparison.train(name, task, [RATE], 1, steps).seen
        runs[name] = {key: x[0, 0] for key, x in seen.items()}
    # The same batches in both runs; the norm of a bad one is a thousand times as long.
    norms = runs["global norm 1"]["clip/grad_norm"]
    bad = np.flatnonzero(norms > 50 * np.median(norms))
    fig, ax = plt.subplots(figsize=(7.5, 3), layout="constrained")
    looks = {"no clip": ("0.55", "without a clip"), "global norm 1": ("C0", "clipped to norm 1")}
    for name, (color, said) in looks.items():
        where, loss = smooth(runs[name]["loss"], bad)
        ax.plot(where, loss, color=color, linewidth=1.8)
        ax.text(steps * 1.01, loss[-1], said, color=color, va="center")
    for i, step in enumerate(bad):
        ax.axvline(step, color="C3", linewidth=0.9, linestyle=":", zorder=0)
        if i == 0:
            ax.text(step - 3, ax.get_ylim()[1], "bad batches", color="C3", ha="right", va="top")
    ax.set(xlabel="step", ylabel="loss, nats per character", xlim=(0, steps))
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)


def smooth(loss: np.ndarray, bad: np.ndarray, width: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """The running median of the losses of good batches."""
    good = np.setdiff1d(np.arange(len(loss)), bad)
    windows = np.lib.stride_tricks.sliding_window_view(loss[good], width)
    return good[width // 2 : -(width // 2)], np.median(windows, axis=1)


def main(argv=None) -> None:
    """Prints the table, or puts it into a document; draws the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", help="a document with marks for the table: README.md")
    parser.add_argument("--picture", help="where to draw the run")
    parser.add_argument("--steps", type=int, default=400, help="of the run that is drawn")
    args = parser.parse_args(argv)
    text = cost((ROOT / "docs/performance.md").read_text())
    publish(text, args.into, "cost")
    if args.picture:
        draw(args.picture, args.steps)


if __name__ == "__main__":
    main()
