"""Formats numbers, tables and recorded runs for a terminal or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # bars of a course
_GAP = "·"  # a step that is not finite, or unknown
_MOST = 40  # keys, about one screen
_HEAD = ("key", "last", "smallest", "largest", "course")


def format_number(x: Any) -> str:
    """Formats a number with three digits.

    >>> [format_number(x) for x in (48.123, 1.0, 512.3, 0.0, 1.5e9)]
    ['48.1', '1.0', '512', '0', '1.5e+09']
    """
    x = float(x)
    text = f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"
    return f"{text}.0" if len(text) == 1 and text != "0" else text


def format_share(share: Any) -> str:
    """Formats a share in percent.

    >>> format_share(0.256)
    '26 %'
    """
    return f"{float(share):.0%}".replace("%", " %")


def sparkline(series: np.ndarray) -> str:
    """Draws a series as a row of bars, each as high as the largest number in its stretch.

    The scale is logarithmic if the numbers are positive and span more than a factor of 100. A dot
    is a stretch without a finite number.

    >>> import numpy as np
    >>> sparkline(np.array([1.0, 2.0, np.nan, 8.0])), sparkline(10.0 ** np.arange(8))
    ('▁▂·█', '▁▂▃▄▅▆▇█')
    """
    parts = np.array_split(np.asarray(series, float), min(_WIDTH, len(series)) or 1)
    # The largest, because the mean of a stretch would hide a spike.
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
    r"""Escapes the characters that Markdown treats as markup.

    >>> print(escape("|g|_2 > 5*x"))
    \|g\|\_2 \> 5\*x
    """
    return re.sub(r"([\\`*_|<>$\[\]~])", r"\\\1", text)


def code(text: str) -> str:
    """Formats text as a Markdown code span that also works in a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def bullets(lines: Iterable[str]) -> str:
    """Formats lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table; its cells are Markdown.

    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], text[1].replace(" ", ""), *text[2:]])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats a table for a terminal: the first column is left-aligned, the others right-aligned.

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
    """Describes a history: how many steps, and the last value, range and course of each key.

    Args:
      steps: (rows,), the numbers of the steps.
      columns: key -> (rows,).
      markdown: whether the output is for a notebook instead of a terminal.

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
    """Formats the last, smallest and largest number of a key, and its course."""
    # Some steps may lack a key. A key without any number shows NaN for all three.
    known = x[~np.isnan(x)] if (~np.isnan(x)).any() else x[-1:]
    return (*map(format_number, (x[-1], known.min(), known.max())), sparkline(x))
