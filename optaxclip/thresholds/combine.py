"""Thresholds made of thresholds, and of rules for one block.

A threshold is an optax transformation: its updates are the norms of all blocks (a scalar, a vector, or a list of small
arrays), what it returns are their bounds, and its `params` is a function that returns the norms of the parameters (a
function, so that only a threshold that asks for them pays for measuring them).  `optax.chain`, `optax.ema` and
`optax.scale` work on thresholds unchanged.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.given import known
from optaxclip.leaves import map_blocks

Threshold = optax.GradientTransformation | optax.Schedule | jax.typing.ArrayLike
Feed = Callable[[jax.Array, jax.Array], jax.Array]


def new_threshold(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """A threshold from `init(norms) -> state` and `update(norms, state, params, **extra_args) -> (bounds, state)`."""
    return optax.GradientTransformationExtraArgs(init, update)


def stateless(bound_of: Callable[[Any, Any], Any]) -> optax.GradientTransformationExtraArgs:
    """A threshold without history: `bound_of(norms, params)` are the bounds."""

    def update_fn(norms, state, params=None, **extra_args):
        return bound_of(norms, params), state

    return new_threshold(lambda norms: optax.EmptyState(), update_fn)


def checked(value: Any, call: str, argument: str, *, wait: bool = True) -> Any:
    """`value`, if it can be a bound: a real number from 0 to infinity, an array of such, or a tracer.

    Without `wait`, for what is called at every step, numbers on a device may be anything.

    Raises:
      ValueError: naming the call and the argument, for a negative number, NaN, a boolean, a string or anything else.
    """
    if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, jax.Array | np.ndarray):
        fine = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        seen = known(value) if fine and wait else value
        fine = fine and (isinstance(seen, jax.Array) or np.all(seen >= 0))
    else:
        fine = isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) >= 0
    if not fine:
        raise ValueError(
            f"{call}: {argument} must be a number from 0 to inf, an array of such, a schedule (a function of the step)"
            f" or a threshold (an optax transformation of norms into bounds); got {value!r}."
        )
    return value


def bound_like(bound: Any, norms: jax.Array) -> jax.Array:
    """A number, or one number a block, in the shape and dtype of the norms."""
    if jnp.ndim(bound) and jnp.shape(bound) != norms.shape:
        raise ValueError(
            f"A bound must be one number, or one number a block: it has shape {jnp.shape(bound)}, the norms have"
            f" shape {norms.shape}."
        )
    return jnp.broadcast_to(jnp.asarray(bound).astype(norms.dtype), norms.shape)


def as_threshold(value: Threshold, call: str, argument: str) -> optax.GradientTransformationExtraArgs:
    """A threshold from whatever one is given as: a number, an array, a tracer, a schedule, or a transformation.

    Raises:
      ValueError: naming the call and the argument, if it is none of these.
    """
    from optaxclip.thresholds.fixed import scheduled, unchanging  # these are parts, and parts stand on this file

    if isinstance(value, optax.GradientTransformation):
        return optax.with_extra_args_support(value)
    if callable(value):
        return scheduled(value)
    return unchanging(checked(value, call, argument))


def hold_where_not_finite(norms: Any, new: Any, old: Any) -> Any:
    """The new state of the blocks whose norm is finite, the old state of the others.

    State that is kept per block starts with the shape of the norms; other state (a counter) moves with any block.
    """
    leaves = [jnp.isfinite(n) for n in jax.tree.leaves(norms)]
    fine = leaves[0] if len(leaves) == 1 else jnp.array([jnp.all(ok) for ok in leaves]).all()

    def pick(new, old):
        mask = fine if new.shape[: fine.ndim] == fine.shape else jnp.any(fine)
        return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new.astype(old.dtype), old)

    return jax.tree.map(pick, new, old)


def over_blocks(rule: Callable[..., tuple], norms: Any, *trees: Any) -> tuple:
    """Maps `rule(norm, ...) -> (bound, state)`, written for one block, over all blocks as one vector operation."""

    def over_all(norm, *rest):
        return functools.reduce(lambda f, _: jax.vmap(f), range(norm.ndim), rule)(norm, *rest)

    return map_blocks(over_all, 2, norms, *trees)


def start_blocks(start: Any, norms: Any) -> Any:
    """The state of one block, once for each block; floats in the dtype of the norms."""

    def state(norm):
        def fill(x):
            x = jnp.asarray(x)
            x = x.astype(norm.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            return jnp.broadcast_to(x, norm.shape + x.shape)

        return jax.tree.map(fill, start)

    return jax.tree.map(state, norms)


def per_block(
    init: Any, step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A threshold from a rule for one block: `step(norm, state) -> (bound, state)`.

    The rule is written for a scalar norm and mapped over all blocks at once, as one vector operation.  The bound that
    it returns holds for the norm that it is given (to decide first and learn after, wrap it in `lag`; to write a
    statistic and the bound that follows from it apart, see `learned`).

    Args:
      init: the state of one block before its first norm, any pytree of numbers.
      step: the rule. Norms that are not finite are computed with, but the state that comes of it is thrown away.

    Example, the longest norm so far, times 0.9:

    >>> import jax.numpy as jnp, optaxclip
    >>> def rule(norm, longest):
    ...     longest = jnp.maximum(norm, longest)
    ...     return 0.9 * longest, longest
    >>> threshold = optaxclip.per_block(0.0, rule)
    >>> norms = jnp.array([1.0, 2.0])
    >>> threshold.update(norms, threshold.init(norms))
    (Array([0.9, 1.8], dtype=float32), Array([1., 2.], dtype=float32))
    """

    def update_fn(norms, state, params=None, **extra_args):
        bounds, new = over_blocks(step, norms, state)
        return bounds, jax.tree.map(hold_where_not_finite, norms, new, state)

    return new_threshold(lambda norms: start_blocks(init, norms), update_fn)


def raw(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Feed: the norm as it is. A spike enters the statistic at its full size."""
    return norms


def clipped(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Feed: the norm after the clip. A spike counts as its bound; a lasting change of scale is followed slowly."""
    return jnp.minimum(norms, bounds)


def accepted(norms: jax.Array, bounds: jax.Array) -> jax.Array:
    """Feed: only norms within the bound. A lasting change of scale is never learned: give it a way out."""
    return jnp.where(norms <= bounds, norms, jnp.nan)


def _something(norms: jax.Array) -> jax.Array:
    """Norms, and NaN in place of zeros: of a frozen leaf or an unused expert there is nothing to learn."""
    return jnp.where(norms == 0, jnp.nan, norms)


class LagState(NamedTuple):
    """State of `lag`: that of the threshold inside, and the bounds that hold for the next norms."""

    inner: optax.OptState
    clip_bound: Any


def lag(threshold: Threshold, *, feed: Feed = raw) -> optax.GradientTransformationExtraArgs:
    """Decides first and learns after: the bound for a norm comes from the norms before it.

    There is no bound (infinity) until the first finite norm was seen. Norms of zero are not learned from.

    Args:
      threshold: what makes bounds of norms, for example `optax.chain(optax.ema(0.9), optax.scale(2.0))`: twice the
        running mean.
      feed: what the threshold learns of a norm, given its bound: `raw`, `clipped`, `accepted`, or a function
        `(norms, bounds) -> norms` in which NaN means "nothing".

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> threshold = optaxclip.lag(optax.scale(2.0))
    >>> bound, state = threshold.update(jnp.array(3.0), threshold.init(jnp.array(0.0)))
    >>> float(bound), float(threshold.update(jnp.array(5.0), state)[0])
    (inf, 6.0)
    """
    inner = as_threshold(threshold, "lag", "threshold")

    def init_fn(norms):
        return LagState(inner.init(norms), jax.tree.map(lambda n: jnp.full_like(n, math.inf), norms))

    def update_fn(norms, state, params=None, **extra_args):
        fed = jax.tree.map(_something, jax.tree.map(feed, norms, state.clip_bound))
        bounds, inner_state = inner.update(fed, state.inner, params, **extra_args)
        return state.clip_bound, hold_where_not_finite(fed, LagState(inner_state, bounds), state)

    return new_threshold(init_fn, update_fn)


def _combined(a: Threshold, b: Threshold, pick, call: str, argument: str):
    """The threshold that applies `pick` to the bounds of two."""
    both = as_threshold(a, call, "threshold"), as_threshold(b, call, argument)

    def update_fn(norms, state, params=None, **extra_args):
        (x, one), (y, two) = (t.update(norms, s, params, **extra_args) for t, s in zip(both, state, strict=True))
        return jax.tree.map(pick, x, y), (one, two)

    return new_threshold(lambda norms: tuple(t.init(norms) for t in both), update_fn)


def at_most(threshold: Threshold, cap: Threshold) -> optax.GradientTransformationExtraArgs:
    """The smaller of two bounds: an adaptive threshold under an absolute cap.

    >>> import jax.numpy as jnp, optaxclip
    >>> threshold = optaxclip.at_most(lambda step: 10.0 + step, 5.0)
    >>> float(threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))[0])
    5.0
    """
    return _combined(threshold, cap, jnp.minimum, "at_most", "cap")


def at_least(threshold: Threshold, floor: Threshold) -> optax.GradientTransformationExtraArgs:
    """The larger of two bounds: an adaptive threshold that can not shrink to nothing.

    >>> import jax.numpy as jnp, optaxclip
    >>> threshold = optaxclip.at_least(0.0, 1e-3)
    >>> round(float(threshold.update(jnp.array(1.0), threshold.init(jnp.array(0.0)))[0]), 6)
    0.001
    """
    return _combined(threshold, floor, jnp.maximum, "at_least", "floor")
