"""What a node of a chain is to the rules of `check`: a clip of which kind, or one of a few families of names."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optaxclip.actions import rescale, zero
from optaxclip.checking.chains import Node, holds, maker, makers
from optaxclip.norms import l2, rms
from optaxclip.scopes import leaf, tree

# What makes the size of an update independent of the gradient's.
NORMALISERS = {
    "normalize_by_update_norm", "normalize", "scale_by_acprop", "scale_by_adadelta", "scale_by_adam", "scale_by_adamax",
    "scale_by_adan", "scale_by_ademamix", "scale_by_adopt", "scale_by_amsgrad", "scale_by_belief",
    "scale_by_factored_rms", "scale_by_lion", "scale_by_muon", "scale_by_novograd", "scale_by_radam", "scale_by_rms",
    "scale_by_rprop", "scale_by_rss", "scale_by_sign", "scale_by_simplified_ademamix", "scale_by_sm3",
    "scale_by_stable_rms", "scale_by_stddev", "scale_by_yogi",
}  # fmt: skip
STATEFUL = (NORMALISERS - {"scale_by_sign", "normalize_by_update_norm", "normalize"}) | {"trace", "ema"}
GUARDS = {"apply_if_finite", "skip_nonfinite", "skip_spikes"}
SCALES = {"scale", "scale_by_learning_rate", "scale_by_schedule", "identity"}
THRESHOLDS = {"learned", "lag", "per_block", "_combined", "stateless", "scheduled", "param_relative", "until"}
REMEMBERING = {"MultiSteps", "lookahead", "mechanize", "schedule_free"}
_OPTAX = {"clip_by_global_norm": "tree", "clip": "element", "clip_by_block_rms": "other", "adaptive_grad_clip": "other"}


class Clip(NamedTuple):
    """What a rule asks of a clip.

    Attributes:
      block: which numbers share one norm: "tree", "leaf", "element" or "other".
      bound: the fixed bound, a number, an array or a schedule; None if it is learned or relative.
      learned: it decides by the history of the norms, so a norm out of the ordinary is what it looks for.
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
    facts, paths = node.facts, node.paths(node.facts.get("exclude"))
    if node.name in _OPTAX:
        bound = facts.get("max_norm", facts.get("max_delta"))
        clip = Clip(_OPTAX[node.name], bound, paths=paths)
    elif node.name == "clip_by":
        clip = _of_clip_by(facts, paths)
    elif node.name == "clip_elements":
        limits = holds(facts["limits"].update)
        symmetric = "threshold" in limits  # ours to clip; else to clip_by_value, or learned
        bound = _made_of(limits["threshold"]) if symmetric else _both(limits.get("limits", ()))
        clip = Clip("element", bound, learned=not limits.keys() & {"threshold", "limits"}, hard=symmetric, paths=paths)
    else:
        return None
    return None if number_of(clip.bound) == math.inf else clip


def measures(node: Node) -> Clip | None:
    """What a node measures: as a clip, or as a wrapper that skips steps by their norm."""
    if node.name == "skip_spikes":
        facts = holds(holds(node.facts["judge"])["watch"].update)
        return _of_clip_by(facts, node.paths(facts["exclude"]))
    return as_clip(node)


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


def seeks_spikes(node: Node) -> bool:
    """Whether a node looks for global norms out of the ordinary, to clip them or to skip the step."""
    test = measures(node)
    return test is not None and test.block == "tree" and (test.learned or node.name == "skip_spikes")


def _of_clip_by(facts: dict[str, Any], paths: frozenset[str]) -> Clip:
    """What our own engine does: see `optaxclip.clip_by`."""
    scope, norm = holds(facts["cut"])["scope"], holds(facts["measured"])["norm"]
    action, threshold, made_by = holds(facts["factor_rule"])["action"], facts["threshold"], makers(facts["threshold"])
    block = "tree" if scope is tree else "leaf" if scope is leaf and norm is not rms else "other"
    hard = action is rescale or maker(action) == "_action"
    learned = bool(made_by & {"learned", "lag"}) and "previous" not in made_by
    bounds = hard or action is zero or maker(action) in ("smooth", "_leave_alone")
    bound = _made_of(threshold) if bounds and facts["view"] is None else None
    return Clip(block, bound, learned and bounds, hard, norm is l2, paths)


def _made_of(threshold: optax.GradientTransformation) -> Any:
    """The number or schedule that a threshold was made of; None for any other."""
    facts = holds(threshold.update)
    if "bound_of" in facts:
        return holds(facts["bound_of"]).get("bound")
    return facts.get("schedule")


def _both(limits) -> Any:
    """The limits of `clip_by_value`; None, which says nothing, if there are none or one is infinite."""
    values = [holds(limit).get("value", limit) for limit in limits]
    return None if any(abs(number_of(value)) == math.inf for value in values) else tuple(values) or None


def number_of(bound: Any) -> float:
    """A bound as a Python number; NaN, which equals nothing, if it is not one."""
    known = isinstance(bound, int | float | np.generic | np.ndarray | jax.Array) and np.ndim(bound) == 0
    return float(bound) if known and not isinstance(bound, jax.core.Tracer) else math.nan


def constant_of(value: Any) -> float:
    """A number that stays what it is; NaN for any other, also for one that `optax.inject_hyperparams` may change."""
    return math.nan if isinstance(value, jax.Array) else number_of(value)
