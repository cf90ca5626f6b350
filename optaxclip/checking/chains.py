"""What a chain is made of, read off its update functions.

An optax transformation is a pair of closures, and its state often an `EmptyState`, but a closure says who made it
(`clip_by_global_norm.<locals>.update_fn`) and what it holds.  From that a chain is written down once, as a flat list of
nodes in the order in which gradients pass them; each node knows the holders around it, so that "does this one feed that
one" has an answer.  What a foreign wrapper does between its inside and its outside cannot be read: nothing is said to
pass its border.
"""

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.leaves import Exclude, is_measured, matcher, path_string

# Wrappers whose inside gets what they get, and whose result is made of that of their inside: where they keep it.
_INSIDE = {
    "MultiSteps": "_opt",
    "apply_if_finite": "inner",
    "flatten": "inner",
    "lookahead": "fast_optimizer",
    "mechanize": "base_optimizer",
    "reset_moments": "inner",
    "scale_by_stable_rms": "inner",
    "schedule_free": "base_optimizer",
    "skip_nonfinite": "inner",
    "skip_spikes": "inner",
    "split_real_and_imaginary": "inner",
}
_SERIES = {"chain", "named_chain"}
HOLDERS = _SERIES | _INSIDE.keys() | {"partition", "masked", "inject_hyperparams"}
_DEEPEST, _MOST = 64, 10_000  # a foreign wrapper may hold itself


@dataclass(frozen=True, eq=False)
class Node:
    """One transformation of a chain.

    Attributes:
      name: the function that made it, such as "scale_by_adam"; with its module, if that is not optax or optaxclip.
      where: the way to it, such as "chain[1]/partition['decoder']/scale_by_adam".
      facts: what its functions hold: the arguments that it was made with, and more.
      leaves: the paths of the floating-point leaves that it gets; None where that is unknown.
      holders: the nodes around it, outermost first.
      place: how many nodes come before it.
    """

    name: str
    where: str
    facts: dict[str, Any]
    leaves: frozenset[str] | None
    holders: tuple["Node", ...]
    place: int

    def paths(self, exclude: Exclude = None) -> frozenset[str]:
        """The leaves that it gets, without those that are excluded; none, where they are unknown."""
        return frozenset(path for path in self.leaves or () if not matcher(exclude)(path))


def described(tx: optax.GradientTransformation, params: Any) -> list[Node]:
    """All nodes of a chain, holders before what they hold, in the order in which gradients pass them."""
    return list(_walk(tx, params, "", (), itertools.count()))


def _walk(tx, params: Any, way: str, holders: tuple[Node, ...], places: Iterator[int]) -> Iterator[Node]:
    name, facts = _made(tx)
    node = Node(name, way + name, facts, _paths(params), holders, next(places))
    yield node
    if len(holders) < _DEEPEST and node.place < _MOST:
        for key, inner, seen in _held(node, tx, params):
            yield from _walk(inner, seen, f"{way}{name}{key}/", (*holders, node), places)


def common(a: Node, b: Node) -> tuple[Node, ...]:
    """The holders that two nodes share, each counted among its own."""
    pairs = zip((*a.holders, a), (*b.holders, b), strict=False)
    return tuple(x for x, _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))


def feeds(a: Node, b: Node) -> bool:
    """Whether what leaves `a` goes on to a later `b`: they part in a chain, and nothing foreign is between."""
    shared = common(a, b)
    if a.place >= b.place or a in shared or shared[-1].name not in _SERIES:
        return False
    return all(holder.name in HOLDERS for holder in (a.holders + b.holders)[len(shared) :] if holder not in shared)


def holds(fn: Callable) -> dict[str, Any]:
    """What a function holds: the variables of its closure, or the attributes of the object whose method it is."""
    fn = _plain(fn)
    if isinstance(fn, functools.partial):
        return holds(fn.func) | fn.keywords
    if inspect.ismethod(fn):
        return dict(getattr(fn.__self__, "__dict__", {}))
    names = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(fn, "__closure__", None) or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that was never set
            found[name] = cell.cell_contents
    return found


def maker(fn: Callable) -> str:
    """The function that made a function; with its module, if that is not optax or optaxclip.

    Read off the code, not off `__qualname__`, which `functools.wraps` copies from what is wrapped.
    """
    fn = _plain(fn)
    if isinstance(fn, functools.partial):
        return maker(fn.func)
    code = getattr(fn, "__code__", None)
    name = code.co_qualname.split(".")[0] if code else type(fn).__name__
    module = getattr(fn, "__globals__", {}).get("__name__", "")
    return name if module.split(".")[0] in ("optax", "optaxclip") else f"{module}.{name}"


def makers(value: Any, depth: int = 12) -> set[str]:
    """The makers of all functions that can be reached from a value."""
    if depth == 0 or isinstance(value, str | bytes | jax.Array):
        return set()
    if isinstance(value, dict | tuple | list):
        inside = value.values() if isinstance(value, dict) else value
        return set().union(*(makers(x, depth - 1) for x in inside))
    return {maker(value)} | makers(holds(value), depth - 1) if callable(value) else set()


def _plain(fn: Any) -> Any:
    """The Python function inside a compiled one."""
    while hasattr(fn, "__wrapped__") and not isinstance(fn, types.FunctionType):
        fn = fn.__wrapped__
    return fn


def _is_transformation(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def _made(tx) -> tuple[str, dict[str, Any]]:
    """The name of a transformation, and what it holds, less the wrappers that change nothing."""
    name, facts = maker(tx.update), holds(tx.init) | holds(tx.update)
    if name == "with_extra_args_support":
        return _made(facts["tx"])
    if name == "skip_spikes":
        return name, facts | _made(facts["skipping"])[1]
    return ("skip_nonfinite" if name == "_skipping" else name), facts


def _held(node: Node, tx: optax.GradientTransformation, params: Any) -> list[tuple[str, Any, Any]]:
    """What a node holds: the key, the transformation, and the parameters that it sees."""
    facts = node.facts
    if node.name in HOLDERS:
        try:
            return _BY_NAME.get(node.name, _of_others)(facts, params, _INSIDE.get(node.name))
        except Exception:  # a user's function may ask for what is not here: then nothing can be seen
            return []
    if _module(tx) == "optaxclip":  # its own thresholds are transformations, but not of gradients
        return []
    found = [(key, x) for key, value in facts.items() for x in _flat(value) if _is_transformation(x)]
    return [(f"<{i}:{key}>", x, params) for i, (key, x) in enumerate(found)]


def _module(tx) -> str:
    return getattr(_plain(tx.update), "__globals__", {}).get("__name__", "").split(".")[0]


def _flat(value: Any):
    if _is_transformation(value):
        return [value]
    return list(value.values() if isinstance(value, dict) else value) if isinstance(value, dict | list | tuple) else []


def _of_chain(facts, params, _):
    pairs = zip(facts["init_fns"], facts["update_fns"], strict=True)
    return [(f"[{i}]", optax.GradientTransformation(*pair), params) for i, pair in enumerate(pairs)]


def _of_named_chain(facts, params, _):
    return [(f"[{name!r}]", tx, params) for name, tx in facts["transforms"]]


def _of_partition(facts, params, _):
    labels = _called(facts["param_labels"], params)
    return [
        (f"[{group!r}]", tx, _picked(params, labels and jax.tree.map(lambda label, g=group: label == g, labels)))
        for group, tx in facts["transforms"].items()
    ]


def _of_masked(facts, params, _):
    return [("", facts["inner"], _picked(params, _called(facts["mask"], params)))]


def _of_inject_hyperparams(facts, params, _):
    now = {name: schedule(schedule.init()) for name, schedule in facts["sched_hps"].items()} | facts["numeric_hps"]
    arrays = {name: jnp.asarray(value) for name, value in now.items()}
    return [("", facts["inner_factory"](**facts["other_hps"], **arrays), params)]


def _of_others(facts, params, inside):
    return [("", facts[inside], params)]


_BY_NAME = {
    "chain": _of_chain,
    "named_chain": _of_named_chain,
    "partition": _of_partition,
    "masked": _of_masked,
    "inject_hyperparams": _of_inject_hyperparams,
}


def _called(tree_or_function: Any, params: Any) -> Any:
    """Labels or a mask, of the parameters if they are a function; None if that fails."""
    try:
        return tree_or_function(params) if callable(tree_or_function) else tree_or_function
    except Exception:  # a user's function may ask for what is not here: then it is unknown which leaves it means
        return None


def _picked(params: Any, mask: Any) -> Any:
    """The parameters under a mask, or a prefix of one; None where that is unknown."""
    try:
        return jax.tree.map(lambda m, p: p if m else optax.MaskedNode(), mask, params) if mask is not None else None
    except (TypeError, ValueError):
        return None


def _paths(params: Any) -> frozenset[str] | None:
    if params is None:
        return None
    flat = jax.tree_util.tree_leaves_with_path(params)
    return frozenset(path_string(path) for path, leaf in flat if is_measured(leaf))
