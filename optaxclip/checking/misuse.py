"""Rules for wrappers and arguments that do not do what they are meant to; see `placement`."""

from __future__ import annotations

from optaxclip.checking.chains import Node, read_chain
from optaxclip.checking.kinds import (
    NORMALISERS,
    STATEFUL,
    Found,
    as_clip,
    find_pairs,
    is_guard,
    is_named,
    to_constant,
    to_number,
)
from optaxclip.closures import find_maker, read_closure


def guard_after_clip(nodes: list[Node]) -> Found:
    """A guard that never sees a NaN or an infinity, since something before it makes them finite."""
    for a, b in find_pairs(nodes, _name_hidden, is_guard):
        yield (
            b.where,
            f"it never sees {_name_hidden(a)}: {a.where} before it makes that finite, and the"
            " optimizer takes the step.",
            f"the guard outside: {b.name}(optax.chain(clip, optimizer)).",
        )


def _name_hidden(node: Node) -> str | None:
    """Says in words what a node turns into finite numbers; None if nothing."""
    if node.name == "zero_nans":
        return "a NaN"
    clip = as_clip(node)
    if clip is None:
        return None
    if node.about is not None and node.about.nonfinite == "zero":
        return "a NaN or an infinity"
    limited = clip.block == "element" and (clip.bound is not None or clip.learned)
    return "an infinity" if limited else None


def guard_without_optimizer(nodes: list[Node]) -> Found:
    """A guard that holds only clips, while the optimizer after it takes the step."""
    for a, b in find_pairs(nodes, is_guard, is_named(*STATEFUL)):
        inside = [n for n in nodes if a in n.holders and not n.is_holder]
        # If anything else is inside, the guard may protect that: a moment, a schedule.
        if inside and all(as_clip(n) for n in inside):
            yield (
                a.where,
                f"it holds only a clip, so a skipped step reaches {b.where} as a gradient of zeros:"
                " moments decay and momentum moves the parameters.",
                f"the optimizer inside as well: {a.name}(optax.chain(clip, optimizer)).",
            )


def guard_in_accumulation(nodes: list[Node]) -> Found:
    """A guard that only sees a mean, in which a NaN stays: `(1 - emit) * acc` keeps it."""
    for holder in filter(is_named("MultiSteps"), nodes):
        # By default MultiSteps skips no micro-batch.
        accepts_all = find_maker(holder.facts.get("_should_skip_update_fn", len)) == "MultiSteps"
        inside = [n for n in nodes if holder in n.holders]
        guards = [n for n in inside if is_guard(n) or "NaN" in (_name_hidden(n) or "")]
        if accepts_all and guards and not any(map(is_guard, holder.holders)):
            yield (
                guards[0].where,
                f"{holder.where} keeps a NaN of one micro-batch in its mean forever, so from then"
                " on this guard skips or zeroes every step: training silently stops.",
                "optax.MultiSteps(..., should_skip_update_fn=optax.skip_not_finite), which drops"
                " such micro-batches; or the guard outside,"
                " optaxclip.skip_nonfinite(optax.MultiSteps(...).gradient_transformation()).",
            )


def threshold_as_clip(nodes: list[Node]) -> Found:
    """A threshold in a chain of gradients."""
    for node in filter(is_named("threshold"), nodes):
        yield (
            node.where,
            "it is a threshold, which turns norms into bounds: here each number of a gradient"
            " becomes a bound.",
            "a clip that uses it: optaxclip.clip_by(threshold).",
        )


def optimizer_as_threshold(nodes: list[Node]) -> Found:
    """An optimizer instead of a threshold."""
    for node in nodes:
        if node.about is None or node.about.threshold is None:
            continue
        # Read without parameters: a threshold sees norms, and their paths are not known.
        inside = read_chain(node.about.threshold, None)
        steps = [n for n in inside if n.name in NORMALISERS or _flips_sign(n)]
        if steps:
            yield (
                node.where,
                f"its bound is the step that {steps[0].where} makes from the norm: it is negative"
                " or does not depend on the size of the norm.",
                "a number, a schedule or a threshold as the bound, and the optimizer after the"
                " clip: optax.chain(optaxclip.clip_by(1.0), optimizer).",
            )


def _flips_sign(node: Node) -> bool:
    """Whether a node multiplies by a negative number, as by a learning rate."""
    # A rate that `optax.inject_hyperparams` may change is an array; its sign will not change.
    if to_number(node.facts.get("step_size")) < 0:
        return node.name == "scale"
    # Optax writes a scheduled rate as `m * learning_rate(count)`, where m is -1 or 1.
    schedule = node.facts.get("step_size_fn", len)
    is_rate = find_maker(schedule) == "scale_by_learning_rate"
    # Only the sign matters, and no schedule of a rate changes it.
    return is_rate and to_constant(read_closure(schedule).get("m")) < 0


def idle_exclude(nodes: list[Node]) -> Found:
    """An `exclude` that leaves out no leaf of the parameters, or all of them."""
    for node in nodes:
        exclude = node.about.exclude if node.about is not None else None
        # In a branch the leaves to exclude may be missing anyway.
        if exclude is None or not node.leaves or node.leaves != nodes[0].leaves:
            continue
        left, example = node.paths(exclude), min(node.leaves)
        if left == node.leaves or not left:
            yield (
                node.where,
                f"exclude={exclude!r} matches {'none' if left else 'all'} of the"
                f" {len(node.leaves)} leaves, so"
                f" {'nothing is left out' if left else 'nothing is measured or clipped'}.",
                f"a pattern that is found in some paths, which look like {example!r}.",
            )
