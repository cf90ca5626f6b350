"""The types of every part and every state, with their shapes. Nothing here computes.

A tree of updates has L measured leaves, which a scope cuts into B blocks. Everything that the parts
exchange has the shape of the norms:

    tree           ()        one block, a scalar
    leaf, groups   (B,)      one entry per block, in the order of the tree; of a leaf that stacks
                             layers, one per layer
    units          a list    for each set of leaves alike (n leaves, *one entry per unit), and
                             for all leaves that are one unit (n leaves,)

No part but the scope knows which of these it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import optax
from jax.typing import ArrayLike

_F = TypeVar("_F", bound=Callable[..., Any])

# Norms, bounds or factors, in one of the three shapes above.
Norms = Any

# `(norms, bounds) -> factors`, element by element; a block is multiplied by its factor.
Action = Callable[[jax.Array, jax.Array], jax.Array]

# `(norms, bounds) -> norms`: what a statistic learns of norms; infinity and NaN stand for
# "nothing".
Feed = Callable[[jax.Array, jax.Array], jax.Array]

# What may be given as a bound: a number, array or tracer from 0 to inf, a schedule (a function of
# the step), or an optax transformation of norms into bounds, whose `params` are the parameters'
# norms.
Threshold = optax.GradientTransformation | optax.Schedule | ArrayLike

# Which leaves to leave alone: a regular expression searched in the path, or a predicate of paths.
Exclude = str | Callable[[str], bool] | None

# What becomes of a block that is not finite: all NaN, or all zeros.
Nonfinite = Literal["propagate", "zero"]

# The mesh axes that share one norm: a name, a tuple of names, a function of the path, or a tree.
AxisNames = str | tuple[str, ...] | Callable[[str], Any] | Any

# `(leaf, parameters) -> array of that shape`: what is measured in place of the updates.
View = Callable[[jax.Array, jax.Array], jax.Array]

# The group of a leaf: a function of its path, or regular expressions searched in it.
Label = Callable[[str], str] | Mapping[str, str]

# Which leaves stack layers: a regular expression searched in the path or a predicate of paths, for
# the first axis; or a mapping of these to the axis, or axes, that number the layers.
Stacked = str | Callable[[str], bool] | Mapping[Any, int | tuple[int, ...]]


def annotate(function: _F, **facts: Any) -> _F:
    """The function, with facts about it as attributes, so that nobody has to read its closure."""
    for name, fact in facts.items():
        setattr(function, name, fact)
    return function


class Part:
    """A part that is a function, and shows itself as one writes it: `feeds.raw`."""

    def __init__(self, name: str, rule: Callable[..., Any]):
        functools.update_wrapper(self, rule)
        self.name, self.rule = name, rule

    def __call__(self, *args):
        return self.rule(*args)

    def __repr__(self) -> str:
        return self.name


class Norm(NamedTuple):
    """How long a block is.

    Attributes:
      name: how one writes it.
      lift: `|x|ᵖ`, what each number contributes; real, 0 for 0.
      pool: how contributions meet, within a leaf and across leaves and devices: "sum" or "max".
      finish: `(pool, count) -> length`, given the number of elements.
      slope: `(x / length, count) -> d length / dx`, element by element.
      power: p, which tells in what range of x the pool neither overflows nor vanishes.
    """

    name: str
    lift: Callable[[jax.Array], jax.Array]
    pool: Literal["sum", "max"]
    finish: Callable[[jax.Array, ArrayLike], jax.Array]
    slope: Callable[[jax.Array, ArrayLike], jax.Array]
    power: float

    def __repr__(self) -> str:
        return self.name


class SizedView(NamedTuple):
    """A view that asks of the parameters only how large their leaf is, wherever its parts lie.

    Attributes:
      norm: how large.
      see: `(leaf, size) -> array of the leaf's shape`.
    """

    norm: Norm
    see: Callable[[jax.Array, jax.Array], jax.Array]


class Blocks(NamedTuple):
    """How the L measured leaves of one tree are cut into blocks.

    Attributes:
      names: (B,) the names of the blocks; None for `tree` and `units`, whose blocks have none.
      index: (L,) the block of each leaf; of a leaf that stacks layers that of the first layer,
        behind which those of the others follow; empty for `units`.
      axes: (L,) the axes of each leaf that one unit or layer spans; None for blocks of whole
        leaves.
    """

    names: tuple[str, ...] | None
    index: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...] | None = None

    @property
    def units(self) -> bool:
        """Whether the blocks are units, whose norms are a list of arrays."""
        return self.axes is not None and self.names is None


class Scope(NamedTuple):
    """Which numbers share one norm.

    Attributes:
      name: how one writes it.
      cut: `(paths, shapes) -> Blocks`.
      named: whether its blocks have names.
    """

    name: str
    cut: Callable[[Sequence[str], Sequence[tuple[int, ...]]], Blocks]
    named: bool = False

    def __repr__(self) -> str:
        return self.name


class Metrics(NamedTuple):
    """What the last update did, and how often.

    The first six fields have the shape of the norms, for `units` that of all units: they are
    sharded as the leaf, and reduced only where they are read. A clip that does not measure has None
    where it would have to.

    Attributes:
      grad_norm: the norm before the clip, float32 (float64 for float64 leaves).
      clip_bound: the bound that it was held against.
      clip_factor: what the block was multiplied by.
      clipped_share: 1 if the norm was over the bound, else 0; of elements their share.
      clipped_steps: int32, the steps on which the norm was over the bound.
      nonfinite_steps: int32, the steps on which the norm was NaN or infinite.
      total_steps: int32 scalar, all steps.
      blocks: the names of the blocks, see `optaxclip.record.pack_names`.
    """

    grad_norm: Any
    clip_bound: Any
    clip_factor: Any
    clipped_share: Any
    clipped_steps: Any
    nonfinite_steps: Any
    total_steps: Any
    blocks: Any


class ClipState(NamedTuple):
    """State of every clip.

    Attributes:
      threshold: the state of the threshold.
      metrics: what the clip did; read it with `optaxclip.metrics`.
    """

    threshold: optax.OptState
    metrics: Metrics
