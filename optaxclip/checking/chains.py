"""A chain as a flat list of nodes, in the order in which gradients reach them.

Our transformations describe themselves; for those of Optax the closures are read. Each node knows
the holders around it, which answers "does this one feed that one?". What a foreign wrapper does to
its inputs and outputs cannot be read, so no node inside it feeds one outside, nor the reverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.base import Exclude
from optaxclip.closures import find_maker, find_module, read_closure, unwrap
from optaxclip.engine import Description
from optaxclip.trees import flatten_with_paths, is_measured, matcher
from optaxclip.validate import is_transformation

# Wrappers of Optax that pass their input to the transformation inside and return its output, each
# with the variable that holds that transformation.
_INSIDE = {
    "MultiSteps": "_opt",
    "apply_if_finite": "inner",
    "conditionally_mask": "inner",
    "flatten": "inner",
    "lookahead": "fast_optimizer",
    "mechanize": "base_optimizer",
    "schedule_free": "base_optimizer",
    "split_real_and_imaginary": "inner",
}
_SERIES = {"chain", "named_chain"}
_HOLDERS = _SERIES | _INSIDE.keys() | {"partition", "masked", "inject_hyperparams"}
# A foreign wrapper may hold itself, directly or through others.
_MAX_DEPTH, _MAX_NODES = 64, 10_000


# Nodes are compared by identity: the same transformation at two places makes two nodes.
@dataclass(frozen=True, eq=False)
class Node:
    """One transformation of a chain.

    Attributes:
      name: the function that made it, such as "scale_by_adam", with its module if that is not
        optax or optaxclip; "threshold" for any of our thresholds.
      where: the path to it, such as "chain[1]/partition['decoder']/scale_by_adam".
      about: how it describes itself; None if it is not one of our transformations.
      facts: the variables of its closures, including the arguments that it was made with; empty
        for our own code.
      leaves: the paths of the floating-point leaves that it gets; None if they are unknown.
      holders: the nodes around it, outermost first.
      place: how many nodes come before it.
    """

    name: str
    where: str
    about: Description | None
    facts: dict[str, Any]
    leaves: frozenset[str] | None
    holders: tuple[Node, ...]
    place: int

    @property
    def is_aggregation(self) -> bool:
        """Whether it is a mean over clients, each of which runs what is inside."""
        return self.about is not None and self.name.startswith("aggregation.")

    @property
    def is_holder(self) -> bool:
        """Whether it passes its input to the nodes inside and returns their output."""
        ours = self.about is not None and self.about.inner is not None
        # A mean of clipped messages is not what a clip returned: it may be longer or shorter.
        return self.name in _HOLDERS or (ours and not self.is_aggregation)

    def paths(self, exclude: Exclude = None) -> frozenset[str]:
        """The leaves that it gets, without those excluded; empty if they are unknown."""
        excluded = matcher(exclude)
        return frozenset(path for path in self.leaves or () if not excluded(path))


def read_chain(tx: optax.GradientTransformation, params: Any) -> list[Node]:
    """Lists the nodes in the order in which gradients reach them, holders before what they hold."""
    return list(_walk(tx, params, "", (), itertools.count()))


def _walk(tx, params: Any, path: str, holders: tuple[Node, ...], places) -> Iterator[Node]:
    tx = _strip(tx)
    about, leaves = _find_description(tx.update), _find_paths(params)
    module, name = find_module(tx.update), find_maker(tx.update) if about is None else about.name
    name = "threshold" if module.startswith("optaxclip.thresholds.") else name
    facts: dict[str, Any] = {}
    # Checked per function, because a foreign wrapper may pass on the `init` of one of ours.
    for fn in (tx.init, tx.update):
        facts |= {} if find_module(fn).startswith("optaxclip.") else read_closure(fn)
    node = Node(name, path + name, about, facts, leaves, holders, next(places))
    yield node
    if len(holders) < _MAX_DEPTH and node.place < _MAX_NODES:
        for key, inner, seen in _open(node, params):
            yield from _walk(inner, seen, f"{path}{name}{key}/", (*holders, node), places)


def find_shared(a: Node, b: Node) -> tuple[Node, ...]:
    """The holders that two nodes share, outermost first; a node counts as a holder of itself."""
    pairs = zip((*a.holders, a), (*b.holders, b), strict=False)
    return tuple(x for x, _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))


def _find_description(update: Callable) -> Description | None:
    """The description that an update function carries; None if it is not one of ours."""
    update = unwrap(update)
    # `functools.wraps` copies the description to a foreign wrapper, where it may not be true.
    return None if hasattr(update, "__wrapped__") else getattr(update, "description", None)


def feeds(a: Node, b: Node) -> bool:
    """Whether the output of `a` reaches `b`: both are in one chain, no foreign wrapper between."""
    shared = find_shared(a, b)
    # Two branches of a partition, or of a foreign wrapper, do not see each other's output.
    if a.place >= b.place or a in shared or shared[-1].name not in _SERIES:
        return False
    own = (a.holders + b.holders)[len(shared) :]
    return all(holder.is_holder for holder in own if holder not in shared)


def _strip(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Unwraps `optax.with_extra_args_support`, which changes nothing."""
    while find_maker(tx.update) == "with_extra_args_support":
        tx = read_closure(tx.update)["tx"]
    return tx


def _open(node: Node, params: Any) -> list[tuple[str, Any, Any]]:
    """Lists what a node holds: the key, the transformation, and the parameters that it sees."""
    if node.about is not None:
        return [] if node.about.inner is None else [("", node.about.inner, params)]
    if node.name in _HOLDERS:
        try:
            return _OPEN.get(node.name, _open_wrapper)(node, params)
        except Exception:
            # A user's factory may fail outside of training; its inside then stays unknown.
            return []
    # A threshold transforms norms, so nothing inside it ever sees a gradient.
    if node.name == "threshold":
        return []
    found = [(k, x) for k, v in node.facts.items() for x in _list_items(v) if is_transformation(x)]
    return [(f"<{i}:{key}>", x, params) for i, (key, x) in enumerate(found)]


def _list_items(value: Any) -> list:
    if is_transformation(value) or not isinstance(value, dict | list | tuple):
        return [value]
    return list(value.values() if isinstance(value, dict) else value)


def _open_wrapper(node: Node, params):
    return [("", node.facts[_INSIDE[node.name]], params)]


def _open_chain(node: Node, params):
    pairs = zip(node.facts["init_fns"], node.facts["update_fns"], strict=True)
    return [(f"[{i}]", optax.GradientTransformation(*p), params) for i, p in enumerate(pairs)]


def _open_named_chain(node: Node, params):
    return [(f"[{name!r}]", tx, params) for name, tx in node.facts["transforms"]]


def _open_partition(node: Node, params):
    labels = _evaluate(node.facts["param_labels"], params)

    def group_of(group):
        return labels and jax.tree.map(lambda label: label == group, labels)

    groups = node.facts["transforms"].items()
    return [(f"[{group!r}]", tx, _pick(params, group_of(group))) for group, tx in groups]


def _open_masked(node: Node, params):
    return [("", node.facts["inner"], _pick(params, _evaluate(node.facts["mask"], params)))]


def _open_inject_hyperparams(node: Node, params):
    facts = node.facts
    # Passed as arrays, as in the wrapper, so that no rule takes what may change for a constant.
    now = {name: schedule(schedule.init()) for name, schedule in facts["sched_hps"].items()}
    arrays = {name: jnp.asarray(value) for name, value in (now | facts["numeric_hps"]).items()}
    return [("", facts["inner_factory"](**facts["other_hps"], **arrays), params)]


_OPEN = {
    "chain": _open_chain,
    "named_chain": _open_named_chain,
    "partition": _open_partition,
    "masked": _open_masked,
    "inject_hyperparams": _open_inject_hyperparams,
}


def _evaluate(tree_or_function: Any, params: Any) -> Any:
    """Labels or a mask, applied to the parameters if it is a function. None if that fails."""
    try:
        return tree_or_function(params) if callable(tree_or_function) else tree_or_function
    except Exception:
        # A user's function may fail outside of training; for unknown labels nothing is reported.
        return None


def _pick(params: Any, mask: Any) -> Any:
    """The parameters under a mask or a prefix of one; None if it is unknown or does not fit."""
    try:
        picked = jax.tree.map(lambda m, p: p if m else optax.MaskedNode(), mask, params)
    except (TypeError, ValueError):
        return None
    return None if mask is None else picked


def _find_paths(params: Any) -> frozenset[str] | None:
    if params is None:
        return None
    return frozenset(path for path, leaf in flatten_with_paths(params)[0] if is_measured(leaf))
