"""What the rules need to know about a node: its kind of clip, or the family it belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.actions import keep
from optaxclip.checking.chains import Node, feeds, find_shared
from optaxclip.engine import Description
from optaxclip.norms import l2, rms
from optaxclip.scopes import tree
from optaxclip.thresholds.blocks import learns

# These make the size of an update independent of the size of the gradient.
NORMALISERS = {
    "normalize_by_update_norm", "normalize", "scale_by_acprop", "scale_by_adadelta",
    "scale_by_adam", "scale_by_adamax", "scale_by_adan", "scale_by_ademamix", "scale_by_adopt",
    "scale_by_amsgrad", "scale_by_belief", "scale_by_factored_rms", "scale_by_lion",
    "scale_by_muon", "scale_by_novograd", "scale_by_radam", "scale_by_rms", "scale_by_rprop",
    "scale_by_rss", "scale_by_sign", "scale_by_simplified_ademamix", "scale_by_sm3",
    "scale_by_stddev", "scale_by_yogi",
}  # fmt: skip
_FORGETFUL = {"scale_by_sign", "normalize_by_update_norm", "normalize"}
STATEFUL = (NORMALISERS - _FORGETFUL) | {"trace", "ema"}
SCALES = {"scale", "scale_by_learning_rate", "scale_by_schedule", "identity"}
_HOLDERS_WITH_MEMORY = {"MultiSteps", "lookahead", "mechanize", "schedule_free"}
_OPTAX = {
    "clip_by_global_norm": "tree",
    "clip": "element",
    "clip_by_block_rms": "other",
    "adaptive_grad_clip": "other",
}
# The names shown by actions that bound a norm; `normalize` sets it. What a user's action does is
# not known, and it shows none of these names.
_LIMITS = ("actions.rescale", "actions.band", "actions.smooth", "actions.zero", "actions.keep")

Test = Callable[[Node], Any]
# For each mistake: where it is, what goes wrong, and what to write instead.
Found = Iterator[tuple[str, str, str]]


class Clip(NamedTuple):
    """What the rules need to know about a clip.

    Attributes:
      block: which numbers share one norm: "tree", "leaf", "element" or "other".
      bound: the fixed bound: a number, an array or a schedule, or both limits of `clip_by_value`;
        None if it is learned or relative.
      learned: whether it compares a norm with earlier norms, and thus looks for unusual ones.
      hard: whether blocks within the bound are left alone, and others shortened to it.
      l2: whether its norm is the Euclidean norm.
      paths: the leaves that it measures.
    """

    block: str
    bound: Any = None
    learned: bool = False
    hard: bool = True
    l2: bool = True
    paths: frozenset[str] = frozenset()


def as_clip(node: Node) -> Clip | None:
    """The node as a clip; None if it is not one, or only measures because its bound is infinite."""
    about = node.about
    if about is None:
        bound = node.facts.get("max_norm", node.facts.get("max_delta"))
        clip = Clip(_OPTAX[node.name], bound, paths=node.paths()) if node.name in _OPTAX else None
    else:
        is_clip = about.threshold is not None and about.inner is None and about.action is not keep
        clip = _describe(about, node) if is_clip else None
    return None if clip is None or to_number(clip.bound) == math.inf else clip


def as_test(node: Node) -> Clip | None:
    """Like `as_clip`, but also for a wrapper that skips steps because of their norm."""
    if node.about is None or not is_guard(node):
        return as_clip(node)
    clip = _describe(node.about, node)
    return None if to_number(clip.bound) == math.inf else clip


def _describe(about: Description, node: Node) -> Clip:
    """Tells from its description what one of our own clips is."""
    paths, update = node.paths(about.exclude), about.threshold.update
    bound, learned = getattr(update, "bound", None), learns(update)
    if about.kind == "elements":
        # `clip_by_value` may move elements that are within the larger modulus.
        two_sided = isinstance(bound, tuple)
        fixed = _require_finite(bound) if two_sided else bound
        return Clip("element", fixed, learned or bound is None, not two_sided, paths=paths)
    if about.kind == "other":
        return Clip("other", hard=False, l2=False, paths=paths)
    action, block = repr(about.action), _name_block(about, paths)
    limits = action.startswith(_LIMITS)
    # With a view the bound is in other units and cannot be compared.
    fixed = bound if limits and about.view is None else None
    hard = action.startswith("actions.rescale")
    return Clip(block, fixed, learned and limits, hard, about.norm is l2, paths)


def _name_block(about: Description, paths: frozenset[str]) -> str:
    """Names what shares one norm. Groups may turn out to be the whole tree, or single leaves."""
    if about.scope == tree:
        return "tree"
    if about.scope is None or not about.scope.named:
        return "other"
    try:
        blocks = about.scope.cut(tuple(sorted(paths)), ((),) * len(paths)).names or ()
    except Exception:
        # The labels do not fit these leaves. That is not reported here: the update will raise.
        return "other"
    if len(blocks) == 1:
        return "tree"
    # Bounding the root mean square of a leaf deliberately bounds updates, as in Adafactor.
    return "leaf" if len(blocks) == len(paths) and about.norm is not rms else "other"


def _require_finite(limits: tuple) -> tuple | None:
    """The lower and the upper limit; None if one is infinite, so that infinities pass."""
    return None if any(abs(to_number(limit)) == math.inf for limit in limits) else limits


def read_bound(node: Node) -> Any:
    """The fixed bound of a clip; None for anything else."""
    clip = as_clip(node)
    return clip and clip.bound


def has_bound(node: Node) -> bool:
    """Whether a node is a clip with a fixed bound."""
    return read_bound(node) is not None


def is_global(node: Node) -> bool:
    """Whether a node clips all its leaves by one norm to a fixed bound."""
    clip = as_clip(node)
    return clip is not None and clip.block == "tree" and clip.bound is not None and bool(clip.paths)


def is_guard(node: Node) -> bool:
    """Whether a node skips steps: `apply_if_finite`, `skip_nonfinite`, `skip_spikes`."""
    about = node.about
    ours = about is not None and about.inner is not None and about.action is keep
    return ours or node.name == "apply_if_finite"


def seeks_spikes(node: Node) -> bool:
    """Whether a node looks for unusual global norms, to clip them or to skip the step."""
    test = as_test(node)
    return test is not None and test.block == "tree" and (test.learned or is_guard(node))


def to_number(bound: Any) -> float:
    """A bound as a Python number; NaN, which equals nothing, if it is not a known number."""
    known = isinstance(bound, int | float | np.generic | np.ndarray | jax.Array)
    if not known or np.ndim(bound) or isinstance(bound, jax.core.Tracer):
        return math.nan
    return float(bound)


def to_constant(value: Any) -> float:
    """Like `to_number`, but NaN for an array, which `optax.inject_hyperparams` may change."""
    return math.nan if isinstance(value, jax.Array) else to_number(value)


def is_named(*names: str) -> Test:
    """A test of whether a node has one of these names."""
    return lambda node: node.name in names


def find_pairs(nodes: list[Node], first: Test, second: Test) -> Iterator[tuple[Node, Node]]:
    """Yields each `first` node with each `second` node that it feeds and shares leaves with."""
    seconds = [n for n in nodes if n.leaves and second(n)]
    for a in nodes:
        if a.leaves and first(a):
            yield from ((a, b) for b in seconds if feeds(a, b) and a.leaves & (b.leaves or set()))


def list_between(nodes: list[Node], a: Node, b: Node) -> list[Node]:
    """Lists the nodes on the way from one to another, but only those holders that have a memory."""
    passed = [c for c in nodes if not c.is_holder and feeds(a, c) and feeds(c, b)]
    own = [h for h in a.holders + b.holders if h not in find_shared(a, b)]
    return passed + [h for h in own if h.name in _HOLDERS_WITH_MEMORY]


def only_scales(nodes: list[Node], a: Node, b: Node) -> bool:
    """Whether only scales and clips are between two nodes."""
    return all(n.name in SCALES or as_clip(n) for n in list_between(nodes, a, b))
