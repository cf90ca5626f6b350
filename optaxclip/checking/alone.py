"""The rules for what a node does wrong by itself, wherever it stands."""

from collections.abc import Iterator

from optaxclip.checking.chains import Node
from optaxclip.checking.kinds import THRESHOLDS


def threshold_as_clip(nodes: list[Node]) -> Iterator[tuple[str, str, str]]:
    """What turns norms into bounds, where gradients pass."""
    for node in nodes:
        if node.name in THRESHOLDS:
            yield (
                node.where,
                "it is a threshold, which turns norms into bounds: here each number of a gradient becomes a bound.",
                "a clip by it: optaxclip.clip_by(threshold).",
            )


def idle_exclude(nodes: list[Node]) -> Iterator[tuple[str, str, str]]:
    """An `exclude` that leaves out no leaf of the parameters, or all of them."""
    for node in nodes:
        exclude = node.facts.get("exclude")
        if exclude is None or not node.leaves or node.leaves != nodes[0].leaves:  # a branch may lack what it excludes
            continue
        left, example = node.paths(exclude), min(node.leaves)
        if left == node.leaves or not left:
            yield (
                node.where,
                f"exclude={exclude!r} matches {'none' if left else 'all'} of the {len(node.leaves)} leaves, so"
                f" {'nothing is left out' if left else 'nothing is measured or clipped'}.",
                f"a pattern that is found in some paths, which look like {example!r}.",
            )
