"""The types of every part and every state, with their shapes. Nothing here computes.

A tree of updates has L measured leaves, which a scope cuts into B blocks. Everything the parts
exchange has the shape of the norms:

    tree           ()        one block, a scalar
    leaf, groups   (B,)      one entry per block, in tree order; a leaf that stacks layers has one
                             entry per layer
    units          a list    one array per set of alike leaves, (n leaves, *one entry per unit),
                             and one (n leaves,) for all leaves that are a single unit

Only the scope knows which of these it is given.
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

# `(norms, bounds) -> norms`: what a statistic learns from; infinity and NaN mean "nothing".
Feed = Callable[[jax.Array, jax.Array], jax.Array]

# What may be given as a bound: a number, array or tracer from 0 to inf, a schedule (a function of
# the step), or an optax transformation of norms into bounds, whose `params` are the norms of the
# parameters.
Threshold = optax.GradientTransformation | optax.Schedule | ArrayLike

# Which leaves to leave alone: a regular expression searched in the path, or a predicate of paths.
Exclude = str | Callable[[str], bool] | None

# What a block that is not finite becomes: all NaN, or all zeros.
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
    """Sets facts about a function as attributes, so that nobody has to read its closure."""
    for name, fact in facts.items():
        setattr(function, name, fact)
    return function


class Part:
    """A part that is a function, and whose repr is how one writes it: `feeds.raw`."""

    def __init__(self, name: str, rule: Callable[..., Any]):
        functools.update_wrapper(self, rule)
        self.name, self.rule = name, rule

    # Scopes and norms cannot say this: whatever can be called, `optax.inject_hyperparams` takes for
    # a schedule.
    def __call__(self, *args, **more):
        if more or len(args) != 2:  # called where it is to be passed: `actions.zero()`
            raise TypeError(
                f"{self.name} is passed as it is: write {self.name}, without parentheses."
            )
        return self.rule(*args)

    def __repr__(self) -> str:
        return self.name


class Norm(NamedTuple):
    """How long a block is.

    Attributes:
      name: how one writes it.
      lift: `|x|ᵖ`, what each number contributes; real, at least 0, and 0 for 0.
      pool: how contributions are combined within a leaf and across leaves and devices: "sum" or
        "max".
      finish: `(pool, count) -> length`, given the number of elements.
      slope: `(x / length, count) -> d length / dx`, element by element.
      power: p; it determines the range of x in which the pool neither overflows nor underflows.
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
    """A view that needs only the size of the parameters of a leaf, however these are sharded.

    Attributes:
      norm: how that size is measured.
      see: `(leaf, size) -> array of the leaf's shape`.
    """

    norm: Norm
    see: Callable[[jax.Array, jax.Array], jax.Array]


class Blocks(NamedTuple):
    """How the L measured leaves of one tree are cut into blocks.

    Attributes:
      names: (B,) the names of the blocks; None for `tree` and `units`, whose blocks have none.
      index: (L,) the block of each leaf; for a leaf that stacks layers the block of its first
        layer, which the other layers follow; empty for `units`.
      axes: (L,) the axes of each leaf that one unit or layer spans; None if blocks are made of
        whole leaves.
      over: (L,) inside `shard_map`, the mesh axes over which the layers of each leaf are cut, so
        that a device holds some of them; empty if that is not known.
    """

    names: tuple[str, ...] | None
    index: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...] | None = None
    over: tuple[tuple[str, ...], ...] = ()

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

    The first six fields have the shape of the norms. For `units` they are sharded like the leaves
    and reduced only when they are read. Fields that a clip would have to measure for are None if
    it does not measure.

    Attributes:
      grad_norm: the norm before the clip, float32 (float64 for float64 leaves).
      clip_bound: the bound it was compared with.
      clip_factor: what the block was multiplied by.
      clipped_share: 1 if the norm was over the bound, else 0; for value clipping the share of
        elements clipped.
      clipped_steps: int32, the steps on which the norm was over the bound.
      nonfinite_steps: int32, the steps on which the norm was NaN or infinite.
      total_steps: int32 scalar, all steps.
      blocks: the names of the blocks, see `optaxclip.trees.pack_names`.
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
