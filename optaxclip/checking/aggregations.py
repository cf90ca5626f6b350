"""Rules for means over clients, each of which must send a gradient of its own; see `placement`."""

from __future__ import annotations

from optaxclip import scopes
from optaxclip.checking.chains import Node
from optaxclip.checking.kinds import NORMALISERS, Found, as_clip, find_pairs, is_guard, is_named


def clip_before_aggregation(nodes: list[Node]) -> Found:
    """A clip whose one norm is that of the gradients of all clients."""
    for a, b in find_pairs(nodes, _pools, lambda node: node.is_aggregation):
        yield (
            a.where,
            f"inside shard_map its norm is that of all clients together, whose gradients {b.where}"
            " has yet to average: one client that sends a long gradient shortens those of all"
            " others, and one that sends NaN makes all of them NaN.",
            f"the clip inside, as that of each client: {b.name}(clip, axis_name).",
        )


def _pools(node: Node) -> bool:
    """Whether a node is a clip of ours that measures over all devices."""
    about = node.about
    if about is None or about.kind == "elements" or as_clip(node) is None:
        return False
    return about.scope not in (None, scopes.element)


def guard_around_aggregation(nodes: list[Node]) -> Found:
    """A guard that decides by what clients send, before the aggregation has made it harmless."""
    for node in nodes:
        guards = [holder for holder in node.holders if is_guard(holder)]
        if guards and node.is_aggregation:
            yield (
                guards[0].where,
                f"it sees what each client sends to {node.where}: one client that sends NaN makes"
                " all of them skip the step, at every step if it likes.",
                f"the guard after it: optax.chain(aggregation, {guards[0].name}(optimizer)). What"
                " is not finite counts as nothing sent there.",
            )


def aggregation_after_normaliser(nodes: list[Node]) -> Found:
    """Clients that send the steps of an optimizer of their own."""
    for a, b in find_pairs(nodes, is_named(*NORMALISERS), lambda node: node.is_aggregation):
        yield (
            b.where,
            f"clients send what {a.where} has already normalised, from moments that each keeps for"
            " itself: its size does not depend on that of the gradients, so the bound acts on all"
            " messages alike, or on none.",
            "the aggregation first: optax.chain(aggregation, optimizer).",
        )
