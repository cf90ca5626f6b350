"""Types of results: signs, findings that print one per line, and reports with a fact per line."""

from __future__ import annotations

from typing import Any, NamedTuple

from optaxclip.monitoring.display import bullets, escape, format_number


class Sign(NamedTuple):
    """One sign that something is wrong.

    Attributes:
      name: a short, stable name: "norms-exploding".
      what: what was seen, in words.
      evidence: the numbers.
      fix: what to try.
      step: where it began, counted from 1 as the watch or clip counts; None if it concerns all
        steps.
      block: the block that was first, or has most of it; "" if it is not about one block.
    """

    name: str
    what: str
    evidence: dict[str, float]
    fix: str
    step: int | None = None
    block: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.what}\n    Try: {self.fix}"

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        numbers = ", ".join(f"{k} {format_number(x)}" for k, x in self.evidence.items())
        shown = f" ({escape(numbers)})" if numbers else ""
        return f"**{self.name}**: {escape(self.what)}{shown}<br>*Try:* {escape(self.fix)}"


class Findings(tuple):
    """A tuple that prints its entries one per line, or "nothing found" if it is empty.

    >>> print(Findings(("one", "two")))
    one
    two
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing found"

    # An empty result would display as `()`, which tells the user nothing.
    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return bullets(map(_to_markdown, self)) or "nothing found"


def _to_markdown(entry: Any) -> str:
    return entry._repr_markdown_() if hasattr(entry, "_repr_markdown_") else escape(str(entry))


class Report(str):
    """Text that displays without quotes; in a notebook it is a list with one item per fact.

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
