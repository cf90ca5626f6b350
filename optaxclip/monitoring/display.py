"""Numbers, tables and recorded runs as one reads them, in a terminal or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "·"  # a step that is not finite, or unknown
_MOST = 40  # keys: a screen
_HEAD = ("key", "last", "smallest", "largest", "course")


def format_number(x: Any) -> str:
    """A number in three digits.

    >>> [format_number(x) for x in (48.123, 1.0, 512.3, 0.0, 1.5e9)]
    ['48.1', '1.0', '512', '0', '1.5e+09']
    """
    x = float(x)
    text = f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"
    return f"{text}.0" if len(text) == 1 and text != "0" else text


def format_share(share: Any) -> str:
    """A share in percent.

    >>> format_share(0.256)
    '26 %'
    """
    return f"{float(share):.0%}".replace("%", " %")


def sparkline(series: np.ndarray, width: int = 24) -> str:
    """A series as a row of bars, each as high as the largest number of its stretch.

    The scale is that of logarithms where the numbers are over zero and more than 100-fold apart. A
    dot is a stretch without a finite number.

    >>> import numpy as np
    >>> sparkline(np.array([1.0, 2.0, np.nan, 8.0])), sparkline(10.0 ** np.arange(8))
    ('▁▂·█', '▁▂▃▄▅▆▇█')
    """
    parts = np.array_split(np.asarray(series, float), min(width, len(series)) or 1)
    # The largest: the mean of a stretch would hide the spike that one looks for.
    known = [part[np.isfinite(part)] for part in parts]
    tops = np.array([part.max() if part.size else np.nan for part in known])
    finite = tops[np.isfinite(tops)]
    if not finite.size:
        return _GAP * (len(tops) if len(series) else 0)
    if finite.min() > 0 and finite.max() > 100 * finite.min():
        tops, finite = np.log(tops), np.log(finite)
    low, span = finite.min(), np.ptp(finite) or 1.0
    return "".join(_GAP if np.isnan(x) else _BARS[round(7 * (x - low) / span)] for x in tops)


def escape(text: str) -> str:
    r"""Text in which Markdown finds no marks.

    >>> print(escape("|g|_2 > 5*x"))
    \|g\|\_2 \> 5\*x
    """
    return re.sub(r"([\\`*_|<>$\[\]~])", r"\\\1", text)


def code(text: str) -> str:
    """A code span of Markdown; also in a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; its cells are Markdown.

    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], text[1].replace(" ", ""), *text[2:]])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right.

    >>> print(text_table([("key", "last"), ("clip/bound", "1.0")]))
    key         last
    clip/bound   1.0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [x.rjust(width) for x, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def describe_columns(
    steps: np.ndarray, columns: Mapping[str, np.ndarray], *, markdown: bool = False
) -> str:
    """How many steps there are, and for each key its last number, its range and its course.

    Args:
      steps: (rows,), the numbers of the steps.
      columns: key -> (rows,).
      markdown: whether it is for a notebook, and not for a terminal.

    >>> import numpy as np
    >>> print(describe_columns(np.arange(1, 4), {"loss": np.array([3.0, 2.0, 1.0])}))
    History of 3 steps, 1 to 3
    key   last  smallest  largest  course
    loss   1.0       1.0      3.0     █▅▁
    """
    if not len(steps):
        return "History without a step"
    rows = [(key, *_describe(x)) for key, x in columns.items()]
    shown, more = rows[:_MOST], len(rows) - _MOST
    head = f"History of {len(steps)} steps, {steps[0]} to {steps[-1]}"
    tail = [f"and {more} more keys"] if more > 0 else []
    if not markdown:
        return "\n".join([head, text_table([_HEAD, *shown]), *tail])
    return "\n\n".join(
        [head, markdown_table(_HEAD, [(code(key), *rest) for key, *rest in shown]), *tail]
    )


def _describe(x: np.ndarray) -> tuple[str, ...]:
    """The last number of a key, the smallest and the largest, and its course."""
    # A key may be that of some steps only; one without any number has NaN for all three.
    known = x[~np.isnan(x)] if (~np.isnan(x)).any() else x[-1:]
    return (*map(format_number, (x[-1], known.min(), known.max())), sparkline(x))
