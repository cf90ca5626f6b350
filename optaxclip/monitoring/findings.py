"""What is found, one line below the other, and numbers as one reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

from optaxclip.monitoring.display import bullets, escape


class Sign(NamedTuple):
    """One sign that something is wrong.

    Attributes:
      name: a short, stable name: "norms-exploding".
      what: what is seen, in words.
      evidence: the numbers.
      fix: what to try.
      step: where it began, counted from 1 as the watch or clip counts; None if it is of all steps.
      block: the block that was first, or has most of it; "" if it is not of one.
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
    """A tuple that prints as its entries, one below the other; "nothing found" if it is empty.

    >>> print(Findings(("one", "two")))
    one
    two
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing found"

    # The tuple of an empty one, `()`, says nothing to who has it on the screen.
    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return bullets(map(_to_markdown, self)) or "nothing found"


def _to_markdown(entry: Any) -> str:
    return entry._repr_markdown_() if hasattr(entry, "_repr_markdown_") else escape(str(entry))


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
