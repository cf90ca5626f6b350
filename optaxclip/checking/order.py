"""Which node of a chain comes before which, and what lies between them."""

from collections.abc import Callable, Iterator
from typing import Any

from optaxclip.checking.chains import HOLDERS, Node, common, feeds
from optaxclip.checking.kinds import REMEMBERING, SCALES, as_clip

Test = Callable[[Node], Any]


def pairs(nodes: list[Node], first: Test, second: Test) -> Iterator[tuple[Node, Node]]:
    """All pairs of a `first` node that feeds a `second` one, on some leaves that both get."""
    seconds = [n for n in nodes if n.leaves and second(n)]
    for a in nodes:
        if a.leaves and first(a):
            yield from ((a, b) for b in seconds if feeds(a, b) and not a.leaves.isdisjoint(b.leaves or ()))


def named(*names: str) -> Test:
    return lambda node: node.name in names


def between(nodes: list[Node], a: Node, b: Node) -> list[Node]:
    """What gradients pass on the way from one to the other; of the holders only those that remember other gradients."""
    passed = [c for c in nodes if c.name not in HOLDERS and feeds(a, c) and feeds(c, b)]
    return passed + [h for h in a.holders + b.holders if h.name in REMEMBERING and h not in common(a, b)]


def only_scaled(nodes: list[Node], a: Node, b: Node) -> bool:
    """Whether nothing but scales and clips lies between two nodes."""
    return all(n.name in SCALES or as_clip(n) for n in between(nodes, a, b))
