"""What is in a recorded run, key by key, for whoever looks at it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optaxclip.monitoring.display import code, markdown_table, sparkline, text_table
from optaxclip.monitoring.findings import format_number

_MOST = 40  # keys: a screen
_HEAD = ("key", "last", "smallest", "largest", "course")


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
