"""What a node of a chain is to the rules: a clip of which kind, or one of a few families."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.actions import keep
from optaxclip.checking.chains import Node, feeds, share_holders
from optaxclip.engine import Description
from optaxclip.norms import l2, rms
from optaxclip.scopes import tree
from optaxclip.thresholds.blocks import learns

# What makes the size of an update independent of the gradient's.
NORMALISERS = {
    "normalize_by_update_norm", "normalize", "scale_by_acprop", "scale_by_adadelta",
    "scale_by_adam", "scale_by_adamax", "scale_by_adan", "scale_by_ademamix", "scale_by_adopt", "scale_by_amsgrad",
    "scale_by_belief", "scale_by_factored_rms", "scale_by_lion", "scale_by_muon",
    "scale_by_novograd", "scale_by_radam", "scale_by_rms", "scale_by_rprop", "scale_by_rss",
    "scale_by_sign", "scale_by_simplified_ademamix", "scale_by_sm3", "scale_by_stddev",
    "scale_by_yogi",
}  # fmt: skip
_FORGETFUL = {"scale_by_sign", "normalize_by_update_norm", "normalize"}
STATEFUL = (NORMALISERS - _FORGETFUL) | {"trace", "ema"}
SCALES = {"scale", "scale_by_learning_rate", "scale_by_schedule", "identity"}
_REMEMBERING = {"MultiSteps", "lookahead", "mechanize", "schedule_free"}
_OPTAX = {
    "clip_by_global_norm": "tree",
    "clip": "element",
    "clip_by_block_rms": "other",
    "adaptive_grad_clip": "other",
}
# Actions of ours that bound a norm; `normalize` sets it.
_LIMITS = ("actions.rescale", "actions.band", "actions.smooth", "actions.zero", "actions.keep")

Test = Callable[[Node], Any]
# Where a mistake is, what goes wrong, and what to write instead.
Found = Iterator[tuple[str, str, str]]


class Clip(NamedTuple):
    """What a rule asks of a clip.

    Attributes:
      block: which numbers share one norm: "tree", "leaf", "element" or "other".
      bound: the fixed bound, a number, an array or a schedule; None if it is learned or relative.
      learned: it decides by the history of the norms, so it looks for norms out of the ordinary.
      hard: blocks within the bound are left alone, others shortened to it.
      l2: whether its norm is the plain one.
      paths: the leaves that it measures.
    """

    block: str
    bound: Any = None
    learned: bool = False
    hard: bool = True
    l2: bool = True
    paths: frozenset[str] = frozenset()


def as_clip(node: Node) -> Clip | None:
    """What a node is as a clip; None if it is none, or has an infinite bound and only measures."""
    about = node.about
    if about is None:
        bound = node.facts.get("max_norm", node.facts.get("max_delta"))
        clip = Clip(_OPTAX[node.name], bound, paths=node.paths()) if node.name in _OPTAX else None
    else:
        is_clip = about.threshold is not None and about.inner is None and about.action is not keep
        clip = _describe(about, node) if is_clip else None
    return None if clip is None or number_of(clip.bound) == math.inf else clip


def as_test(node: Node) -> Clip | None:
    """What a node measures: as a clip, or as a wrapper that skips steps by their norm."""
    if node.about is None or not is_guard(node):
        return as_clip(node)
    clip = _describe(node.about, node)
    return None if number_of(clip.bound) == math.inf else clip


def _describe(about: Description, node: Node) -> Clip:
    """Of one of ours."""
    paths, update = node.paths(about.exclude), about.threshold.update
    bound, learned = getattr(update, "bound", None), learns(update)
    if about.kind == "elements":
        two = isinstance(bound, tuple)
        learned = learned or bound is None
        return Clip("element", _pick_finite(bound) if two else bound, learned, not two, paths=paths)
    if about.kind == "other":
        return Clip("other", hard=False, l2=False, paths=paths)
    action, block = repr(about.action), _name_block(about, paths)
    limits = action.startswith(_LIMITS)
    fixed = bound if limits and about.view is None else None
    hard = action.startswith("actions.rescale")
    return Clip(block, fixed, learned and limits, hard, about.norm is l2, paths)


def _name_block(about: Description, paths: frozenset[str]) -> str:
    """Which numbers share one norm; for groups by what is in them."""
    try:
        groups = (
            about.scope.cut(sorted(paths), [()] * len(paths)).names if about.scope.named else None
        )
    except ValueError:  # patterns that do not match
        return "other"
    if about.scope.name == tree.name or (groups and len(groups) == 1):
        return "tree"
    whole_leaves = groups is not None and len(groups) == len(paths)
    return "leaf" if whole_leaves and about.norm is not rms else "other"


def _pick_finite(limits: tuple) -> tuple | None:
    """Limits on both sides; None, which says nothing, if one is infinite."""
    return None if any(abs(number_of(limit)) == math.inf for limit in limits) else limits


def bound_of(node: Node) -> Any:
    """The fixed bound of a clip; None for anything else."""
    clip = as_clip(node)
    return clip and clip.bound


def has_bound(node: Node) -> bool:
    """Whether a node is a clip with a fixed bound."""
    return bound_of(node) is not None


def is_global(node: Node) -> bool:
    """Whether a node clips all that it gets by one norm to a fixed bound."""
    clip = as_clip(node)
    return clip is not None and clip.block == "tree" and clip.bound is not None and bool(clip.paths)


def is_guard(node: Node) -> bool:
    """Whether a node skips steps: `apply_if_finite`, `skip_nonfinite`, `skip_spikes`."""
    about = node.about
    ours = about is not None and about.inner is not None and about.action is keep
    return ours or node.name == "apply_if_finite"


def seeks_spikes(node: Node) -> bool:
    """Whether a node looks for global norms out of the ordinary, to clip them or skip the step."""
    test = as_test(node)
    return test is not None and test.block == "tree" and (test.learned or is_guard(node))


def number_of(bound: Any) -> float:
    """A bound as a Python number; NaN, which equals nothing, if it is not one."""
    known = isinstance(bound, int | float | np.generic | np.ndarray | jax.Array)
    if not known or np.ndim(bound) or isinstance(bound, jax.core.Tracer):
        return math.nan
    return float(bound)


def constant_of(value: Any) -> float:
    """A number that stays what it is; NaN for one that `inject_hyperparams` may change."""
    return math.nan if isinstance(value, jax.Array) else number_of(value)


def is_named(*names: str) -> Test:
    """The test for these names."""
    return lambda node: node.name in names


def pair(nodes: list[Node], first: Test, second: Test) -> Iterator[tuple[Node, Node]]:
    """All pairs of a `first` node that feeds a `second` one, on some leaves that both get."""
    seconds = [n for n in nodes if n.leaves and second(n)]
    for a in nodes:
        if a.leaves and first(a):
            yield from ((a, b) for b in seconds if feeds(a, b) and a.leaves & (b.leaves or set()))


def between(nodes: list[Node], a: Node, b: Node) -> list[Node]:
    """What gradients pass on the way; of the holders only those that remember other gradients."""
    passed = [c for c in nodes if not c.is_holder and feeds(a, c) and feeds(c, b)]
    own = [h for h in a.holders + b.holders if h not in share_holders(a, b)]
    return passed + [h for h in own if h.name in _REMEMBERING]


def only_scaled(nodes: list[Node], a: Node, b: Node) -> bool:
    """Whether nothing but scales and clips lies between two nodes."""
    return all(n.name in SCALES or as_clip(n) for n in between(nodes, a, b))
