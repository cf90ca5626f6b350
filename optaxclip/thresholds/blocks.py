"""Rules for one block, mapped over all blocks, and states that bad norms do not change.

A threshold is an optax transformation: its updates are the norms of all blocks, it returns their
bounds, and its `params` are the norms of the parameters, in the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import xla
from optaxclip.base import Norms, annotate
from optaxclip.validate import named


# A type, not an attribute of the function: a chain of thresholds then has Optax's type, and rightly
# counts as one that may read parameters.
class NormsOnly(optax.GradientTransformationExtraArgs):
    """A threshold that does not read `params`, so that no clip measures the parameters for it."""

    __slots__ = ()


class Fixed(NormsOnly):
    """A threshold that does not read norms either, so that value clipping need not measure."""

    __slots__ = ()


def reads_params(*thresholds: optax.GradientTransformation) -> bool:
    """Whether any of these may read the norms of the parameters; foreign thresholds always may."""
    return not all(isinstance(threshold, NormsOnly) for threshold in thresholds)


def new_threshold(
    init: Callable[..., Any],
    update: Callable[..., Any],
    *inside: optax.GradientTransformation,
    kind: type[optax.GradientTransformationExtraArgs] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A threshold from its two functions.

    Args:
      init: `norms -> state`.
      update: `(norms, state, params=None, **extra_args) -> (bounds, state)`.
      *inside: the thresholds it is made of.
      kind: what it reads. None: norms, and parameters if one of those inside reads them.
    """
    if kind is None:
        kind = optax.GradientTransformationExtraArgs if reads_params(*inside) else NormsOnly
    annotate(update, learns=learns(update, *(threshold.update for threshold in inside)))
    return kind(init, update)


def learns(*updates: Callable) -> bool:
    """Whether these update functions belong to thresholds that judge a norm by earlier norms."""
    return any(getattr(update, "learns", False) for update in updates)


def update_all(
    thresholds: Sequence[optax.GradientTransformationExtraArgs],
    norms: Norms,
    states: Sequence[Any],
    params: Any,
    **extra_args: Any,
) -> tuple[tuple[Norms, ...], tuple[Any, ...]]:
    """Updates several thresholds with the same norms: their bounds, and their states."""
    pairs = zip(thresholds, states, strict=True)
    done = [t.update(norms, state, params, **extra_args) for t, state in pairs]
    return tuple(bounds for bounds, _ in done), tuple(state for _, state in done)


def start_blocks(start: Any, norms: Norms) -> Any:
    """Repeats the state of one block for all blocks: each number becomes an array like the norms.

    With one tree of norms per number, not one state per array of norms, Optax recognizes what is
    kept per block, as it recognizes moments that have the shape of the parameters.
    """

    def fill(x):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        # NumPy turns a Python 0 into int64, but counters are int32 with and without x64.
        whole = np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype

        def like(norm):
            dtype = norm.dtype if jnp.issubdtype(x.dtype, jnp.floating) else whole
            return xla.fill_like(norm, x, dtype)

        return jax.tree.map(like, norms)

    return jax.tree.map(fill, start)


def over_blocks(
    rule: Callable[..., tuple], start: Any, norms: Norms, state: Any, *more: Norms
) -> tuple[Norms, Any]:
    """Maps `rule(norm, state, ...) -> (bound, state)` over all blocks, as one vector operation."""

    # One `vmap` per axis. Reshaping to a single axis and back would gather norms of sharded units.
    def over_array(norm, *rest):
        return functools.reduce(lambda f, _: jax.vmap(f), range(norm.ndim), rule)(norm, *rest)

    # The state has one tree of norms per number; the rule takes one tree of numbers per block.
    one, many = jax.tree.structure(start), jax.tree.structure(norms)
    if not many.num_leaves:  # no unit at all, as in an empty group of `optax.partition`
        return norms, state
    states = jax.tree.transpose(one, many, state)
    arrays = [many.flatten_up_to(x) for x in (norms, states, *more)]
    done = [over_array(*each) for each in zip(*arrays, strict=True)]
    new = jax.tree.transpose(many, one, many.unflatten([new for _, new in done]))
    return many.unflatten([bound for bound, _ in done]), new


def hold(init: Callable[[Norms], Any], norms: Norms, new: Any, old: Any) -> Any:
    """The new state of blocks whose norm is finite, the old state of the others.

    Which state is kept per block is not guessed from shapes: it is what mirrors the norms when
    `init` is given a placeholder for them. Other state, such as a counter, advances if any norm is
    finite.
    """
    # A plain number has no state, and nothing of this is traced.
    if not jax.tree.leaves(old):
        return new
    fine = jax.tree.map(jnp.isfinite, norms)
    # In a tree without leaves no norm is bad.
    each = [jnp.any(ok) for ok in jax.tree.leaves(fine)] or [jnp.array(True)]
    some = each[0] if len(each) == 1 else jnp.any(jnp.stack(each))
    # Devices that hold different units must not count differently.
    some = xla.hold_somewhere(some)
    return jax.tree.map(_pick, _masks(init, old, fine, some), new, old)


def _masks(init, state, fine, some):
    """For each array of a state whether it may change: a mask per block, or one for all."""
    try:
        return optax.tree.map_params(
            init, lambda _, ok: ok, state, fine, transform_non_params=lambda _: some
        )
    except Exception:
        # An `init` that computes with its norms fails on a placeholder. What is kept per block is
        # then unknown, and either all of the state changes or none.
        every = [xla.hold_everywhere(jnp.all(ok)) for ok in jax.tree.leaves(fine)]
        return functools.reduce(jnp.logical_and, every)


def _pick(fine, new, old):
    def pick(new, old):
        new, old = jnp.asarray(new), jnp.asarray(old)
        # State per block may have more axes after those of the norms, such as a window.
        mask = jnp.reshape(fine, jnp.shape(fine) + (1,) * (new.ndim - jnp.ndim(fine)))
        return jnp.where(mask, new.astype(old.dtype), old)

    return jax.tree.map(pick, new, old)


@named
def per_block(
    init: Any, step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
) -> optax.GradientTransformation:
    """A threshold from a rule for one block: `step(norm, state) -> (bound, state)`.

    The rule is written for a scalar norm and mapped over all blocks at once, as one vector
    operation. The bound that it returns is for the norm that it is given. (To decide first and
    learn after, wrap it in `lag`; to separate a statistic from the bound that follows from it, see
    `learned`.)

    Args:
      init: the state of one block before its first norm, any pytree of numbers.
      step: the rule. It is called with norms that are not finite as well, but the clip drops the
        resulting state.

    Example, the longest norm so far, times 0.9:

    >>> import jax.numpy as jnp
    >>> from optaxclip import thresholds
    >>> def rule(norm, longest):
    ...     longest = jnp.maximum(norm, longest)
    ...     return 0.9 * longest, longest
    >>> threshold = thresholds.per_block(0.0, rule)
    >>> norms = jnp.array([1.0, 2.0])
    >>> threshold.update(norms, threshold.init(norms))
    (Array([0.9, 1.8], dtype=float32), Array([1., 2.], dtype=float32))
    """

    def update_fn(norms, state, params=None, **extra_args):
        return over_blocks(step, init, norms, state)

    return new_threshold(lambda norms: start_blocks(init, norms), update_fn)
