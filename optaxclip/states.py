"""States that are not ours are refused in words, before they fail inside JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from optaxclip.trees import unpack_names

_ADVICE = (
    "initialise with state = tx.init(params), and keep what update returns. For a checkpoint from"
    " before the clip see docs/old-checkpoints.md."
)


class StateGuard:
    """Refuses a state that `init` of the same transformation would not have made.

    Compared are the fields and the shapes of all arrays, not types: a checkpoint library may
    restore another type with the same fields. What `init` made, or what was accepted once, is known
    by its structure and shapes, and not compared again.
    """

    def __init__(self, what: str, kind: type, init: Callable[[Any], Any]):
        self.what, self.kind, self._make = what, kind, init
        self.known: set[Any] = set()

    def init(self, params: Any) -> Any:
        """The state of `init`, which the first update need not look into."""
        state = self._make(params)
        self.known.add(_outline(state, params))
        return state

    def check(self, state: Any, updates: Any) -> None:
        """Raises ValueError unless the state is one for these updates."""
        if state is None:
            raise missing(self.what)
        if not all(hasattr(state, field) for field in getattr(self.kind, "_fields", ())):
            raise ValueError(
                f"{self.what}: this is not the state of a {self.what} but {kind_of(state)}:"
                f" {_ADVICE}"
            )
        # To trace `init` would cost more than the step, where an update is not jitted.
        outline = _outline(state, updates)
        if outline not in self.known:
            self._compare(state, updates)
            self.known.add(outline)

    def _compare(self, state: Any, updates: Any) -> None:
        # Shapes, and closed over: `eval_shape` takes no functions or strings as arguments, which an
        # unfiltered model has, and returns none.
        shapes = jax.tree.map(_shape, updates)
        fresh = jax.eval_shape(lambda: jax.tree.map(_to_array, self._make(shapes)))
        # Names first: "new are ['head/bias']" says more than a shape that differs.
        if hasattr(fresh, "metrics"):
            check_names(self.what, *(unpack_names(x.metrics.blocks) for x in (fresh, state)))
        want, got = _shapes(fresh), _shapes(state)
        if want != got:
            wrong = [path for path in (*want, *got) if want.get(path) != got.get(path)]
            raise ValueError(
                f"{self.what}: this state was not made by tx.init of this transformation for this"
                f" tree. At {wrong[0] or 'the top'} it has {got.get(wrong[0], 'nothing')}, and"
                f" needs {want.get(wrong[0], 'nothing')}: {_ADVICE} Of an Equinox model initialise"
                " eqx.filter(model, eqx.is_inexact_array)."
            )


def _outline(state: Any, tree: Any) -> tuple[Any, ...]:
    """A state and its tree without their numbers: what is kept must hold no array alive."""
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


def init_inside(call: str, inner: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The state of what a wrapper holds.

    Raises:
      ValueError: for a model with functions or strings among its leaves, of which optimizers make
        zeros.
    """
    try:
        return inner.init(params)
    except TypeError as error:
        strange = {type(x).__name__ for x in jax.tree.leaves(params) if _to_array(x) is None}
        if not strange:
            raise
        raise ValueError(
            f"{call}: the optimizer inside takes arrays only, and among the leaves are"
            f" {', '.join(sorted(strange))}. Of an Equinox model write"
            " tx.init(eqx.filter(model, eqx.is_inexact_array))."
        ) from error


def missing(call: str) -> ValueError:
    """The error for the state None."""
    return ValueError(
        f"{call}: update was called with the state None, but it has a history. Write"
        " state = tx.init(params) once, and updates, state = tx.update(grads, state, params) at"
        " every step."
    )


def kind_of(state: Any) -> str:
    """The type of a state; of a plain tuple, what is in it."""
    # Not `isinstance`: a NamedTuple is a tuple, too, and has a name to be called by.
    return f"({', '.join(map(kind_of, state))})" if type(state) is tuple else type(state).__name__


def check_names(what: str, new: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises unless the blocks of the updates are those that `init` saw."""
    if bool(new) != bool(known):
        named, other = ("the updates", "the state") if new else ("the state", "the updates")
        raise ValueError(
            f"{what}: the blocks of {named} have names, those of {other} have none: this is the"
            " state of a clip with another scope (or of a tree without gradients). Initialise with"
            " tx.init(params) of this clip."
        )
    added, missing = sorted(set(new) - set(known)), sorted(set(known) - set(new))
    if added or missing:
        raise ValueError(
            f"{what}: the blocks of the updates are not those of tx.init(params): new are {added},"
            f" missing are {missing}. Initialise with the tree that is updated."
        )


class ParamsMemory:
    """What stands for the parameters where Optax gives `init` a placeholder for them.

    `optax.tree.map_params` asks `init` for the state of a placeholder, and lays that over the real
    state. How many blocks there are, and their names, a placeholder does not say: the shapes of the
    last real parameters do. Where all of the tree is one block (`needed` is False) nobody asks.
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
        # Shapes, as arrays would be kept alive, and tracers would leak.
        self.shapes = jax.tree.map(_shape, params)
        return params


def _shape(x: Any) -> Any:
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array else x


__all__ = ["ParamsMemory", "StateGuard", "check_names", "init_inside", "kind_of", "missing"]
