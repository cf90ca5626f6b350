"""Refuses foreign states with a clear error, before they fail inside JAX."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from optaxclip.trees import unpack_names

_ADVICE = "initialise with state = tx.init(params), and keep what update returns."
_CHECKPOINT = "For a checkpoint from before the clip see docs/old-checkpoints.md."
# Threads may build clips at the same time, and a set must not change while it is iterated.
_LOCK = threading.Lock()
_FILTER = "eqx.filter(model, eqx.is_inexact_array)"


class StateGuard:
    """Refuses a state that `init` of the same transformation would not have made.

    Compared are the fields and the shapes of all arrays, not types: a checkpoint library may
    restore another type with the same fields. What `init` made, or what was accepted once, is known
    by its structure and shapes, and not compared again.
    """

    # All guards, to name the transformation that made a foreign state. Weak references, because a
    # guard holds on to its transformation.
    alive: ClassVar[weakref.WeakSet[StateGuard]] = weakref.WeakSet()

    def __init__(self, what: str, kind: type, init: Callable[[Any], Any]):
        self.what, self.fields, self._make = what, getattr(kind, "_fields", ()), init
        self.known: set[Any] = set()
        with _LOCK:
            self.alive.add(self)

    def init(self, params: Any) -> Any:
        """The state of `init`, which the first update need not look into."""
        state = self._make(params)
        self.known.add(_outline(state, params))
        return state

    def check(self, state: Any, updates: Any) -> None:
        """Raises ValueError unless the state is one for these updates."""
        if state is None:
            raise missing(self.what)
        if not all(hasattr(state, field) for field in self.fields):
            but = f"this is not a state of {self.what} but {kind_of(state)}"
            raise self._refuse(but, state, updates)
        # To trace `init` would cost more than the step, where an update is not jitted.
        outline = _outline(state, updates)
        if outline not in self.known:
            self._compare(state, updates)
            self.known.add(outline)

    def _compare(self, state: Any, updates: Any) -> None:
        # Shapes, in a closure: as arguments or results `eval_shape` would refuse the functions and
        # strings of an unfiltered model.
        shapes = jax.tree.map(_shape, updates)
        fresh = jax.eval_shape(lambda: jax.tree.map(_to_array, self._make(shapes)))
        # Compare names first: "new are ['head/bias']" says more than a shape that differs.
        if hasattr(fresh, "metrics"):
            new, known = (unpack_names(x.metrics.blocks) for x in (fresh, state))
            if bool(new) != bool(known):
                raise self._refuse(_of_another_scope(named_updates=bool(new)), state, updates)
            check_names(self.what, new, known)
        want, got = _shapes(fresh), _shapes(state)
        if want != got:
            wrong = next(path for path in (*want, *got) if want.get(path) != got.get(path))
            has, needs = got.get(wrong, "nothing"), want.get(wrong, "nothing")
            but = (
                "this state was not made by tx.init of this transformation for this tree, at"
                f" {wrong or 'the top'} it has {has}, and needs {needs}"
            )
            raise self._refuse(but, state, updates)

    def _refuse(self, but: str, state: Any, updates: Any) -> ValueError:
        """The error for a foreign state, with what it looks like and what to do about it."""
        outline = _outline(state, updates)
        with _LOCK:
            makers = {guard.what for guard in self.alive if outline in guard.known}
        if makers == {self.what}:
            but = f"{but}. It is that of another {self.what}, with other arguments"
        elif makers:
            but = f"{but}. It looks like a state of {' or '.join(sorted(makers))}"
        advice = _ADVICE if makers else f"{_ADVICE} {_CHECKPOINT}"
        if any(map(_is_module, jax.tree.leaves(updates, is_leaf=_is_module))):
            advice = f"{advice} For an Equinox model initialise with {_FILTER}."
        return ValueError(f"{self.what}: {but}: {advice}")


def _outline(state: Any, tree: Any) -> tuple[Any, ...]:
    """Structure and shapes of a state and its tree; it must not keep any array alive."""
    leaves, structure = jax.tree.flatten((state, tree))
    return structure, *(getattr(leaf, "shape", None) for leaf in leaves)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): tuple(getattr(x, "shape", ()))
        for path, x in flat
        if _to_array(x) is not None
    }


def _to_array(x: Any) -> Any:
    """The leaf itself if it is an array or a number, else None."""
    return x if hasattr(x, "dtype") or isinstance(x, int | float | complex) else None


def _is_module(x: Any) -> bool:
    """Whether `x` is a model of Equinox's, which is no dependency."""
    return any(base.__module__.partition(".")[0] == "equinox" for base in type(x).__mro__)


def init_inside(call: str, inner: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The state of the transformation inside a wrapper."""
    with explain_leaves(call, params):
        return inner.init(params)


@contextlib.contextmanager
def explain_leaves(call: str, tree: Any) -> Generator[None, None, None]:
    """A context for the transformation inside a wrapper.

    Raises:
      ValueError: if it fails and there are functions, strings or PRNG keys among the leaves:
        optimizers multiply every leaf.
    """
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        strange = {name for x in jax.tree.leaves(tree) if (name := _name_strange(x))}
        if not strange:
            raise
        raise ValueError(
            f"{call}: the optimizer inside takes arrays of numbers only, and among the leaves are"
            f" {', '.join(sorted(strange))}. Pass only the arrays: for an Equinox"
            f" model tx.init({_FILTER}). Or leave the others out: optax.masked({call}(...), mask)."
        ) from error


def _name_strange(x: Any) -> str | None:
    """The type of a leaf that cannot be multiplied; None for any other."""
    if _to_array(x) is None:
        return type(x).__name__
    is_key = jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)
    return "PRNG keys" if is_key else None


def missing(call: str) -> ValueError:
    """The error for the state None."""
    return ValueError(
        f"{call}: update was called with the state None, but it has a history. Write"
        " state = tx.init(params) once, and updates, state = tx.update(grads, state, params) at"
        " every step."
    )


def kind_of(state: Any) -> str:
    """The type of a state, and who makes it if that is Optax; of a plain tuple, what is in it."""
    # Not `isinstance`: a NamedTuple is a tuple as well, but it has a name of its own.
    if type(state) is tuple:
        return f"({', '.join(map(kind_of, state))})"
    name = type(state).__name__
    made, own = name.removesuffix("State"), type(state).__module__.startswith("optax.")
    snake = re.sub("(?<!^)(?=[A-Z])", "_", made).lower()
    makers = [x for x in (made, snake) if own and x != name and hasattr(optax, x)]
    return f"{name} of optax.{makers[0]}" if makers else name


def _of_another_scope(*, named_updates: bool) -> str:
    both = ["the updates", "the state"]
    named, other = both if named_updates else reversed(both)
    return (
        f"the blocks of {named} have names, those of {other} have none: this is the state of a clip"
        " with another scope (or of a tree without gradients)"
    )


def check_names(what: str, new: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises unless the blocks of the updates are those that `init` saw."""
    added, missing = sorted(set(new) - set(known)), sorted(set(known) - set(new))
    if added or missing:
        raise ValueError(
            f"{what}: the blocks of the updates are not those of tx.init(params): new are {added},"
            f" missing are {missing}. Initialise with the tree that is updated."
        )


class ParamsMemory:
    """Replaces the placeholder that `optax.tree.map_params` passes to `init` for the parameters.

    Optax compares the state of a placeholder with the real state. A placeholder does not tell how
    many blocks there are, and their names: the shapes of the last real parameters do. They are not
    `needed` if the whole tree is one block.
    """

    def __init__(self, call: str, *, needed: bool):
        self.call, self.needed = call, needed
        self.shapes: Any = None

    def recall(self, params: Any) -> Any:
        """The parameters; for a placeholder the shapes of the last ones."""
        # By name: the class of the placeholder is private to Optax.
        if not jax.tree.leaves(params) and type(params).__name__ == "_ParamsPlaceholder":
            if self.shapes is None and self.needed:
                raise ValueError(
                    f"{self.call}: optax.tree.map_params does not tell init how many blocks the"
                    " parameters have. Call tx.init(params), or jax.eval_shape(tx.init, params), of"
                    " this very transformation first."
                )
            return params if self.shapes is None else self.shapes
        # Only shapes: arrays would be kept alive, and tracers would leak.
        self.shapes = jax.tree.map(_shape, params)
        return params


def _shape(x: Any) -> Any:
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array else x


__all__ = [
    "ParamsMemory",
    "StateGuard",
    "check_names",
    "explain_leaves",
    "init_inside",
    "kind_of",
    "missing",
]
