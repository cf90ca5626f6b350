"""One rule a mistake: each a function of the nodes of a chain that says where it is, what goes wrong, and the mend.

A rule speaks only where it is certain: the mistake must follow from what the chain is made of, whatever the gradients.
Where something cannot be read (a foreign wrapper, labels that cannot be computed) it is silent.
"""

import itertools
from collections.abc import Callable, Iterator

from optaxclip.checking.alone import idle_exclude, threshold_as_clip
from optaxclip.checking.chains import HOLDERS, Node, common, feeds, holds, maker
from optaxclip.checking.kinds import (
    GUARDS,
    NORMALISERS,
    SCALES,
    STATEFUL,
    Clip,
    as_clip,
    bound_of,
    constant_of,
    has_bound,
    is_global,
    measures,
    number_of,
    seeks_spikes,
)
from optaxclip.checking.order import between, named, only_scaled, pairs

Found = Iterator[tuple[str, str, str]]


def _clip_per_branch(nodes: list[Node]) -> Found:
    """The same fixed bound in several branches, each with a norm of its own."""
    clips = [(n, bound_of(n)) for n in nodes if is_global(n)]
    seen: dict[str, set[str]] = {}
    for (a, x), (b, y) in itertools.combinations(clips, 2):
        if (x is y or number_of(x) == number_of(y)) and _in_branches(a, b):
            fork = common(a, b)[-1]
            seen.setdefault(fork.where, set()).update(_branch(n, fork) for n in (a, b))
    for where, branches in seen.items():
        count = sum(_holds_more_than_clips(nodes, branch) for branch in branches)
        if count > 1:
            yield (
                where,
                f"{count} branches clip by a global norm with the same bound, but each measures only its own leaves:"
                f" the norm of all of them together may be √{count} times the bound.",
                "one clip before the branches, optax.chain(clip, optax.partition(...)); or, if a bound for each group"
                " is meant, optaxclip.clip_by_group_norm(max_norm, label) there.",
            )


def _in_branches(a: Node, b: Node) -> bool:
    """Whether the ways to two nodes part into branches with leaves of their own: of a partition, or masked ones."""
    shared = common(a, b)
    if not shared or a in shared or b in shared:
        return False
    masked = all(n.holders[len(shared) :] and n.holders[len(shared)].name == "masked" for n in (a, b))
    return shared[-1].name == "partition" or (shared[-1].name == "chain" and masked and not a.paths() & b.paths())


def _branch(node: Node, fork: Node) -> str:
    """The way to the branch of `fork` that a node is in, with the slash behind it."""
    return node.where[: node.where.index("/", len(fork.where)) + 1]


def _holds_more_than_clips(nodes: list[Node], branch: str) -> bool:
    steps = (n for n in nodes if n.where.startswith(branch) and n.name not in HOLDERS)
    return any(as_clip(n) is None for n in steps)


def _frozen_in_norm(nodes: list[Node]) -> Found:
    """Leaves whose updates are set to zero later on, but whose gradients count in the norm."""
    for a in nodes:
        clip = measures(a)
        if clip is None or clip.block != "tree":
            continue
        zeroed = [z for z in nodes if _zeroes(z)]
        already = frozenset().union(*(z.paths() for z in zeroed if feeds(z, a)))
        later = [z for z in zeroed if a in z.holders or feeds(a, z)]
        frozen = (clip.paths & frozenset().union(*(z.paths() for z in later))) - already
        if frozen and clip.paths - already - frozen:
            yield (
                a.where,
                f"the norm counts the gradients of leaves that are frozen later in the chain ({_some(frozen)}), so they"
                " shorten the updates of the others, and a NaN in them spoils or skips the step.",
                "freeze first, optax.chain(optax.freeze(mask), clip, optimizer); or leave them out of the norm,"
                " exclude= of optaxclip's clips; or move the clip into the branch that is trained.",
            )


def _zeroes(node: Node) -> bool:
    return node.name == "set_to_zero" or (node.name == "scale" and constant_of(node.facts.get("step_size")) == 0)


def _some(paths: frozenset[str], most: int = 3) -> str:
    names = sorted(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _clip_after_normaliser(nodes: list[Node]) -> Found:
    """A fixed bound on updates whose size has nothing to do with the gradients'."""
    for a, b in pairs(nodes, named(*NORMALISERS), has_bound):
        clip = as_clip(b) or Clip("other")
        late = any(n.name in SCALES - {"identity"} for n in between(nodes, a, b))
        if (clip.l2 and clip.block in ("tree", "leaf")) or (clip.block == "element" and late):
            yield (
                b.where,
                f"it clips what {a.where} has already normalised: the size of that has nothing to do with the size of"
                " the gradients, so a spike passes and the bound acts on all steps alike, or on none.",
                "the clip before it, optax.chain(clip, optimizer); to bound updates on purpose,"
                " optaxclip.clip_by_block_rms (as Adafactor does), limit_norm_growth, stable_adamw or larc.",
            )


def _spike_test_after_clip(nodes: list[Node]) -> Found:
    """A rule that looks for norms out of the ordinary, fed with norms that a clip has made ordinary."""
    for a, b in pairs(nodes, is_global, seeks_spikes):
        clip, test = as_clip(a), measures(b)
        fed = clip and test and clip.l2 and test.paths <= clip.paths
        if fed and only_scaled(nodes, a, b):
            yield (
                b.where,
                f"it looks for norms that are out of the ordinary, but {a.where} before it shortens each to its bound:"
                " a spike looks like any clipped step.",
                "the test first: optaxclip.skip_spikes(optax.chain(clip, optimizer)); or give the adaptive clip a cap,"
                " as in optaxclip.zclip(max_norm=1.0), or put the fixed clip behind it.",
            )


def _clip_before_accumulation(nodes: list[Node]) -> Found:
    """A clip of each micro-batch instead of the accumulated gradient."""
    for a, b in pairs(nodes, as_clip, named("MultiSteps")):
        yield (
            a.where,
            f"it clips each micro-batch, before {b.where} accumulates them, not the gradient that is applied: what is"
            " clipped is mostly the noise of small batches, and how much depends on how many there are.",
            "the clip inside: optax.MultiSteps(optax.chain(clip, optimizer), every_k_schedule).",
        )


def _guard_after_clip(nodes: list[Node]) -> Found:
    """A guard against what is not finite, behind something that makes it finite."""
    for a, b in pairs(nodes, _hides, named(*GUARDS)):
        yield (
            b.where,
            f"it never sees {_hides(a)}: {a.where} before it makes that finite, and the optimizer takes the step.",
            f"the guard outside: {b.name}(optax.chain(clip, optimizer)).",
        )


def _hides(node: Node) -> str | None:
    """What a node turns into finite numbers."""
    if node.name == "clip_by" and holds(node.facts["factor_rule"])["nonfinite"] == "zero":
        return "a NaN or an infinity"
    if node.name == "zero_nans":
        return "a NaN"
    clip = as_clip(node)
    limited = clip is not None and clip.block == "element" and (clip.bound is not None or clip.learned)
    return "an infinity" if limited else None


def _guard_without_optimizer(nodes: list[Node]) -> Found:
    """A guard that holds only clips, while the optimizer behind it takes the step."""
    for a, b in pairs(nodes, named(*GUARDS), named(*STATEFUL)):
        inside = [n for n in nodes if a in n.holders and n.name not in HOLDERS]
        if inside and all(as_clip(n) for n in inside):
            yield (
                a.where,
                f"it holds only a clip, so a skipped step reaches {b.where} as a gradient of zeros: moments decay and"
                " momentum moves the parameters.",
                f"the optimizer inside, too: {a.name}(optax.chain(clip, optimizer)).",
            )


def _guard_in_accumulation(nodes: list[Node]) -> Found:
    """A guard in what only sees the mean, which a single NaN spoils for ever: `(1 - emit) * acc` keeps it."""
    for holder in filter(named("MultiSteps"), nodes):
        around = any(n.name in GUARDS for n in holder.holders)
        own = maker(holder.facts.get("_should_skip_update_fn", len)) == "MultiSteps"  # which skips nothing
        guards = [n for n in nodes if holder in n.holders and (n.name in GUARDS or "NaN" in (_hides(n) or ""))]
        if own and guards and not around:
            yield (
                guards[0].where,
                f"{holder.where} keeps a NaN of one micro-batch in its mean for ever, so from then on this guard skips,"
                " or zeroes, every step: training stands still, silently.",
                "the guard outside, optaxclip.skip_nonfinite(optax.MultiSteps(...).gradient_transformation()), or"
                " optax.MultiSteps(..., should_skip_update_fn=optax.skip_not_finite).",
            )


def _clip_before_sign(nodes: list[Node]) -> Found:
    """A clip of what loses its length right after."""
    for a, b in pairs(nodes, has_bound, named("scale_by_sign", "normalize_by_update_norm")):
        clip = as_clip(a) or Clip("other")
        forgets = clip.hard and (b.name == "scale_by_sign" or clip.block == "tree") and a.paths() <= b.paths()
        if forgets and only_scaled(nodes, a, b):
            yield (
                a.where,
                f"it has no effect: {b.where} keeps the direction only, or the signs, whatever the length, and nothing"
                " between them has a memory.",
                "no clip; or a momentum between them, optax.chain(clip, optax.trace(0.9), optax.scale_by_sign(), ...),"
                " of which a clip bounds the share of a spike; or optaxclip.skip_spikes(optimizer).",
            )


def _clip_twice(nodes: list[Node]) -> Found:
    """Two clips of one kind in a row, of which one has no effect."""
    for a, b in pairs(nodes, is_global, is_global):
        one, two = as_clip(a) or Clip("other"), as_clip(b) or Clip("other")
        x, y = constant_of(one.bound), constant_of(two.bound)
        alike = one._replace(bound=None) == two._replace(bound=None) and one.hard and one.l2
        if alike and x == x and y == y and not between(nodes, a, b):
            idle, other = (b, a) if x <= y else (a, b)
            yield (
                idle.where,
                f"it has no effect: {other.where} clips the same leaves by the same norm to {min(x, y):g}.",
                "one clip, with the smaller bound.",
            )


RULES: dict[str, Callable[[list[Node]], Found]] = {
    "clip-per-branch": _clip_per_branch,
    "frozen-in-norm": _frozen_in_norm,
    "clip-after-normaliser": _clip_after_normaliser,
    "spike-test-after-clip": _spike_test_after_clip,
    "clip-before-accumulation": _clip_before_accumulation,
    "guard-after-clip": _guard_after_clip,
    "guard-without-optimizer": _guard_without_optimizer,
    "guard-in-accumulation": _guard_in_accumulation,
    "clip-before-sign": _clip_before_sign,
    "clip-twice": _clip_twice,
    "threshold-as-clip": threshold_as_clip,
    "idle-exclude": idle_exclude,
}
