"""What `recommend` returns: thresholds, reasons, and the line to write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.display import bullets, code, escape, markdown_table
from optaxclip.tuning.series import Numbers


class Reason(NamedTuple):
    """A short, stable `name` ("heavy-tail"), `what` was seen, and the `method` that suits it."""

    name: str
    what: str
    method: str


class Recommendation(NamedTuple):
    """What `recommend` returns; `str` of it is the report.

    Attributes:
      thresholds: share of steps -> the global norm that clips it; shares for which there are too
        few steps are left out.
      layers: layer -> the same for the norm of that layer; empty without layers.
      reasons: what stands out.
      numbers: the statistics behind the reasons.
      code: the line to write, where `optimizer` is yours; empty if there are too few steps.
    """

    thresholds: dict[float, float]
    layers: dict[str, dict[float, float]]
    reasons: tuple[Reason, ...]
    numbers: Numbers
    code: str

    def __str__(self) -> str:
        shares = ", ".join(
            f"{share:.0%} of steps at {bound:.4g}" for share, bound in self.thresholds.items()
        )
        head = _summarize(self.numbers) + (f"; would clip {shares}" if shares else "") + "."
        reasons = [f"- {reason.name}: {reason.what} {reason.method}" for reason in self.reasons]
        return "\n".join([head, *reasons, *([f"Write: {self.code}"] if self.code else [])])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        reasons = (f"**{r.name}**: {escape(r.what)} *{escape(r.method)}*" for r in self.reasons)
        parts = [
            f"{_summarize(self.numbers)}.",
            _tabulate(self.thresholds, self.layers),
            bullets(reasons),
            f"```python\n{self.code}\n```" if self.code else "",
        ]
        return "\n\n".join(filter(None, parts))


def _summarize(n: Numbers) -> str:
    """States the length of the run, its median and its tail, as far as they are known."""
    head = f"{n.steps} steps"
    head += "" if np.isnan(n.median) else f", median norm {n.median:.3g}"
    tail = "" if np.isnan(n.tail_ratio) else f", 99th percentile {n.tail_ratio:.3g} times that"
    return head + tail


def _tabulate(whole: dict[float, float], layers: dict[str, dict[float, float]]) -> str:
    """Tabulates the norms that clip each share of steps, for the whole and for each layer."""
    rows = [("the whole", whole), *((code(name), bounds) for name, bounds in layers.items())]
    cells = [(name, *(f"{x[s]:.4g}" if s in x else "" for s in whole)) for name, x in rows]
    return markdown_table(("clips", *(f"{s:.0%} of steps" for s in whole)), cells) if whole else ""
