"""Rules for clips in the wrong place.

A rule is a function of the nodes of a chain that yields, for each mistake, where it is, what goes
wrong, and what to write instead. It reports only what is certain: the mistake must follow from the
chain itself, whatever the gradients. What cannot be read (a foreign wrapper, labels that cannot be
computed) is not reported.
"""

from __future__ import annotations

import itertools
import math

from optaxclip.checking.chains import Node, feeds, find_shared
from optaxclip.checking.kinds import (
    NORMALISERS,
    SCALES,
    Clip,
    Found,
    as_clip,
    as_test,
    find_pairs,
    has_bound,
    is_global,
    is_named,
    list_between,
    only_scales,
    read_bound,
    seeks_spikes,
    to_constant,
    to_number,
)


def clip_per_branch(nodes: list[Node]) -> Found:
    """The same fixed bound in several branches, each of which measures only its own leaves."""
    clips = [(n, read_bound(n)) for n in nodes if is_global(n)]
    seen: dict[str, set[str]] = {}
    for (a, x), (b, y) in itertools.combinations(clips, 2):
        if (x is y or to_number(x) == to_number(y)) and _are_in_branches(a, b):
            fork = find_shared(a, b)[-1]
            seen.setdefault(fork.where, set()).update(_find_branch(n, fork) for n in (a, b))
    for where, branches in seen.items():
        # A partition that holds only clips is a bound per group, on purpose.
        count = sum(_holds_more_than_clips(nodes, branch) for branch in branches)
        if count > 1:
            yield (
                where,
                f"{count} branches clip by a global norm with the same bound, but each measures"
                " only its own leaves: the norm of all of them together may be"
                f" √{count} times the bound.",
                "one clip before the branches, optax.chain(clip, optax.partition(...)); or, if a"
                " bound for each group is intended, optaxclip.clip_by_group_norm(max_norm, label)"
                " there.",
            )


def _are_in_branches(a: Node, b: Node) -> bool:
    """Whether two nodes are in different branches, which have no leaves in common."""
    shared = find_shared(a, b)
    if not shared or a in shared or b in shared:
        return False
    below = [n.holders[len(shared) : len(shared) + 1] for n in (a, b)]
    masked = all(holder and holder[0].name == "masked" for holder in below)
    apart = shared[-1].name == "chain" and masked and not a.paths() & b.paths()
    return shared[-1].name == "partition" or apart


def _find_branch(node: Node, fork: Node) -> str:
    """The path to the branch of `fork` that holds a node, with a slash at its end."""
    return node.where[: node.where.index("/", len(fork.where)) + 1]


def _holds_more_than_clips(nodes: list[Node], branch: str) -> bool:
    steps = (n for n in nodes if n.where.startswith(branch) and not n.is_holder)
    return any(as_clip(n) is None and not n.is_aggregation for n in steps)


def frozen_in_norm(nodes: list[Node]) -> Found:
    """Leaves whose updates are later set to zero, but whose gradients count in the norm."""
    for a in nodes:
        clip = as_test(a)
        if clip is None or clip.block != "tree":
            continue
        zeroed = [z for z in nodes if _zeroes(z)]
        # Leaves frozen before the clip have gradients of zero, which add nothing to the norm.
        # For a clip in an aggregation what is around that counts.
        place = next((h for h in a.holders if h.is_aggregation), a)
        already = frozenset().union(*(z.paths() for z in zeroed if feeds(z, place)))
        later = [z for z in zeroed if a in z.holders or feeds(place, z)]
        frozen = (clip.paths & frozenset().union(*(z.paths() for z in later))) - already
        # If nothing else is trained, there are no updates that could be shortened.
        if frozen and clip.paths - already - frozen:
            yield (
                a.where,
                "the norm counts the gradients of leaves that are frozen later in the chain"
                f" ({_list_some(frozen)}), so they shorten the updates of the others, and a NaN in"
                " them spoils or skips the step.",
                "freeze first, optax.chain(optax.freeze(mask), clip, optimizer); or leave them out"
                " of the norm with exclude= of optaxclip's clips; or move the clip into the branch"
                " that is trained.",
            )


def _zeroes(node: Node) -> bool:
    by_zero = node.name == "scale" and to_constant(node.facts.get("step_size")) == 0
    return node.name == "set_to_zero" or by_zero


def _list_some(paths: frozenset[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(sorted(paths)[:3]) + more


def clip_after_normaliser(nodes: list[Node]) -> Found:
    """A fixed bound on updates whose size does not depend on the size of the gradients."""
    for a, b in find_pairs(nodes, is_named(*NORMALISERS), has_bound):
        clip = as_clip(b) or Clip("other")
        # Before the learning rate updates are about 1 in size, and a bound by element is intended.
        late = any(n.name in SCALES - {"identity"} for n in list_between(nodes, a, b))
        if (clip.l2 and clip.block in ("tree", "leaf")) or (clip.block == "element" and late):
            yield (
                b.where,
                f"it clips updates that {a.where} has already normalised: their size does not"
                " depend on the size of the gradients, so a spike passes and the bound acts on all"
                " steps alike, or on none.",
                "the clip before it, optax.chain(clip, optimizer); to bound updates on purpose,"
                " optaxclip.clip_by_block_rms (as Adafactor does), limit_norm_growth, stable_adamw"
                " or larc.",
            )


def spike_test_after_clip(nodes: list[Node]) -> Found:
    """A test for unusual norms after a clip that has made them usual."""
    for a, b in find_pairs(nodes, is_global, seeks_spikes):
        clip, test = as_clip(a), as_test(b)
        # Leaves that the clip does not see may still spike, and the test would notice.
        fed = clip and test and clip.l2 and test.paths <= clip.paths
        if fed and only_scales(nodes, a, b):
            yield (
                b.where,
                f"it looks for unusual norms, but {a.where} before it shortens each to its bound: a"
                " spike looks like any other clipped step.",
                "the test first: optaxclip.skip_spikes(optax.chain(clip, optimizer)); or give the"
                " adaptive clip a cap, as in optaxclip.zclip(max_norm=1.0), or put the fixed clip"
                " after it.",
            )


def watch_after_clip(nodes: list[Node]) -> Found:
    """A watch of gradients that sees no norm above the bound of the clip before it."""
    for a, b in find_pairs(nodes, is_global, is_named("watch")):
        clip = as_clip(a)
        fed = clip and clip.l2 and b.about and b.paths(b.about.exclude) <= clip.paths
        # If one watch is before the clip, a second one is meant to see what the clip leaves.
        both = any(feeds(n, a) for n in nodes if n.name == "watch")
        # After a scale, which may be the learning rate, the watch sees steps.
        if fed and not both and all(as_clip(n) for n in list_between(nodes, a, b)):
            yield (
                b.where,
                f"no norm that it sees is over the bound of {a.where} before it: it misses spikes"
                " and explosions, and its median, quantiles and candidates are those of clipped"
                " norms.",
                "the watch first: optax.chain(watch(), clip, optimizer); or after the optimizer,"
                " where it sees steps.",
            )


def clip_before_accumulation(nodes: list[Node]) -> Found:
    """A clip of each micro-batch instead of the accumulated gradient."""
    for a, b in find_pairs(nodes, as_clip, is_named("MultiSteps")):
        yield (
            a.where,
            f"it clips each micro-batch before {b.where} accumulates them, not the gradient that"
            " is applied: it mostly clips the noise of small batches, and how much it clips"
            " depends on their number.",
            "the clip inside: optax.MultiSteps(optax.chain(clip, optimizer), every_k_schedule).",
        )


def clip_before_unscale(nodes: list[Node]) -> Found:
    """A fixed bound on gradients whose loss scale is removed only after the clip."""
    for a, b in find_pairs(nodes, has_bound, is_named("dynamic_loss_scale")):
        yield (
            a.where,
            f"it clips gradients that are still scaled: {b.where} after it removes the loss"
            " scale, so its bound is too small by that factor.",
            "the clip inside: dynamic_loss_scale(optax.chain(clip, optimizer)).",
        )
    # Reported only before an optimizer that ignores the size of gradients, where a constant factor
    # has no other use: before any other optimizer it may be part of the learning rate. Only powers
    # of two are reported, because loss scales are powers of two.
    for a, b in find_pairs(nodes, has_bound, _unscales):
        normalised = any(feeds(b, n) for n in nodes if n.name in NORMALISERS and n.leaves)
        if normalised and only_scales(nodes, a, b):
            scale = to_constant(b.facts.get("step_size"))
            yield (
                a.where,
                f"it clips gradients that are still scaled: {b.where} after it multiplies them by"
                f" {scale:g}, so its bound is {scale:g} times what it seems to be.",
                "the scale first: optax.chain(optax.scale(1 / loss_scale), clip, optimizer).",
            )


def _unscales(node: Node) -> bool:
    size = to_constant(node.facts.get("step_size")) if node.name == "scale" else math.nan
    return 0 < size < 1 and math.frexp(size)[0] == 0.5


def clip_before_sign(nodes: list[Node]) -> Found:
    """A clip right before something that discards the length of the update."""
    for a, b in find_pairs(nodes, has_bound, is_named("scale_by_sign", "normalize_by_update_norm")):
        clip = as_clip(a) or Clip("other")
        # A sign forgets any scale; a norm of the whole update only one that all leaves share.
        forgets = b.name == "scale_by_sign" or clip.block == "tree"
        if clip.hard and forgets and a.paths() <= b.paths() and only_scales(nodes, a, b):
            yield (
                a.where,
                f"it has no effect: {b.where} keeps only the direction or the signs, whatever the"
                " length, and nothing between them has a memory.",
                "no clip; or a momentum between them, optax.chain(clip, optax.trace(0.9),"
                " optax.scale_by_sign(), ...), since a clip bounds a spike's share of it; or"
                " optaxclip.skip_spikes(optimizer).",
            )


def clip_twice(nodes: list[Node]) -> Found:
    """Two consecutive clips of the same kind, so that the larger bound has no effect."""
    for a, b in find_pairs(nodes, is_global, is_global):
        one, two = as_clip(a) or Clip("other"), as_clip(b) or Clip("other")
        # If they are not constant they are NaN, which is not equal to itself.
        x, y = to_constant(one.bound), to_constant(two.bound)
        alike = one._replace(bound=None) == two._replace(bound=None) and one.hard and one.l2
        if alike and x == x and y == y and not list_between(nodes, a, b):
            idle, other = (b, a) if x <= y else (a, b)
            yield (
                idle.where,
                f"it has no effect: {other.where} clips the same leaves by the same norm to"
                f" {min(x, y):g}.",
                "one clip, with the smaller bound.",
            )
