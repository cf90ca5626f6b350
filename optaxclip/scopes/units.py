"""Blocks that are parts of a leaf, without names: units, and single numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from optaxclip.base import Blocks, Scope
from optaxclip.validate import called, fail, makes_part

# Optax's rule by rank: the input axes of a dense layer (IO) or of a convolution (HWIO, DHWIO). For
# rank 3 Optax's code uses axis 0, as here; its documentation says otherwise.
_INPUTS = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}


def _follow_convention(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # As in Optax, (1, n) and (n, 1) count as vectors, which are one unit.
    if sum(n != 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    if len(shape) not in _INPUTS:
        raise ValueError(
            f"{called()}: there is no convention for the axes of a leaf of rank {len(shape)}:"
            f" {path!r} has shape {shape}. Pass the axes that a unit spans, for example as a"
            " function of the path."
        )
    return _INPUTS[len(shape)]


def _unit_axes(path: str, shape: tuple[int, ...], axes: Any, batch_axes: int) -> tuple[int, ...]:
    """The axes of a leaf that one unit spans, counted from 0. See `units`."""
    if not isinstance(batch_axes, int) or not 0 <= batch_axes <= len(shape):
        must = f"batch_axes must be a number of axes of the leaf {path!r}, whose shape is {shape}"
        raise fail(must, batch_axes)
    rank = len(shape) - batch_axes
    if axes is Ellipsis or (rank <= 1 and axes != ()):
        chosen = tuple(range(rank))
    elif axes is None:
        chosen = _follow_convention(path, shape[batch_axes:])
    else:
        chosen = axes if isinstance(axes, list | tuple) else (axes,)
    if not all(isinstance(axis, int | np.integer) and -rank <= axis < rank for axis in chosen):
        raise ValueError(
            f"{called()}: the axes {axes!r} do not fit the leaf {path!r} of shape {shape},"
            f" batch_axes={batch_axes}. Pass an axis, a tuple of axes, ... for all of them, or a"
            " function of the path that returns one of these."
        )
    return tuple(sorted({axis % rank + batch_axes for axis in chosen}))


@makes_part
def units(axes: Any = None, *, batch_axes: int | Callable[[str], int] | None = None) -> Scope:
    """One block per unit, a slice of a leaf along `axes`. Norms, bounds, factors: small arrays.

    Norms are right from 1e-36 to 1e36. On a CPU a unit with a norm below 1e-19 counts as zero if
    another unit of the same leaf has a larger one.

    Args:
      axes: the axes that a unit spans. None: by rank as in Optax, the input axes of a dense layer
        (IO) or convolution (HWIO); an axis or a tuple of axes; `...`: all of them; `()`: none, each
        element is a unit; or a function of the path that returns one of these. Vectors and scalars
        are one unit, except with `()`.
      batch_axes: how many leading axes number layers (as `nn.scan` and `nnx.vmap` stack them), or a
        function of the path that returns it; None for 0. `axes` are counted after these, and no
        unit spans them: `units(..., batch_axes=1)` gives one norm per layer.

    Raises:
      ValueError: where a tree is cut, naming the leaf, if the axes do not fit or the rank has no
        convention.

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import scopes
    >>> kernel = jnp.array([[3.0, 0.3], [4.0, 0.4]])  # two units, which are its columns
    >>> tx = optaxclip.clip_by(1.0, scope=scopes.units())
    >>> tx.update(kernel, tx.init(kernel))[0]
    Array([[0.6, 0.3],
           [0.8, 0.4]], dtype=float32)
    """

    def at(rule: Any, path: str) -> Any:
        return rule(path) if callable(rule) else rule

    def cut(paths, shapes):
        pairs = zip(paths, shapes, strict=True)
        spans = tuple(_unit_axes(p, s, at(axes, p), at(batch_axes, p) or 0) for p, s in pairs)
        # No names: a model has thousands of units, and the state would hold a key for each.
        return Blocks(None, (), spans)

    given = "" if axes is None else "..." if axes is Ellipsis else repr(axes)
    more = "" if batch_axes is None else f"batch_axes={batch_axes!r}"
    return Scope(f"scopes.units({', '.join(filter(None, (given, more)))})", cut)


#: One block per number. Norms, bounds and factors have the shapes of the leaves, and are sharded
#: like them. The record of a clip takes 24 bytes per number, plus the statistics of its threshold.
element = units(())._replace(name="scopes.element")
