"""How results show themselves: as text in a terminal, as Markdown in a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "·"  # a step that is not finite, or unknown


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


class Report(str):
    """Text that shows as it prints, not in quotes; in a notebook a list with a line for each fact.

    >>> Report("step 1: norm 50")
    step 1: norm 50
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        facts = [line.partition(": ") for line in self.splitlines()]
        return bullets(
            f"**{escape(head)}**: {escape(rest)}" if mark else escape(head)
            for head, mark, rest in facts
        )
