"""Quantiles in a number each, and thresholds in shadow: what learns of the norm, and touches nothing."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.thresholds.combine import Threshold, as_threshold, checked, hold_where_not_finite
from optaxclip.thresholds.learned import LearnedState, number
from optaxclip.thresholds.quantile import quantile

Candidates = Mapping[str, Threshold] | Iterable[float]

_RATE = 0.1


class Trackers(NamedTuple):
    """The median, and other quantiles as multiples of it.

    A high or low quantile that is tracked alone follows a change of scale slowly: the one of 5 % goes up by 1/20 of
    the rate at most. As a multiple of the median, which is quick both ways, it is there when the median is.
    """

    median: LearnedState
    multiples: tuple[LearnedState, ...]


def named_levels(quantiles: Iterable[float]) -> dict[str, float]:
    """The quantiles, by name, in the order of the names.

    Raises:
      ValueError: for one outside [0, 1].
    """
    levels = [float(number(q, "watch", "quantiles", 0.0, 1.0 + 1e-9)) for q in quantiles]
    return dict(sorted((f"{q:g}", q) for q in levels))


def fresh_trackers(levels: Mapping[str, float], norm: jax.Array) -> Trackers:
    """Trackers that have seen nothing; each array has a buffer of its own."""
    fresh = quantile(0.5, _RATE).init
    return Trackers(fresh(norm), tuple(fresh(norm) for _ in levels))


def followed(levels: Mapping[str, float], norm: jax.Array, old: Trackers) -> Trackers:
    """The trackers after one more norm. The first ten steps are large ones, so a start far off is soon left."""
    seen = old.median.blocks.seen
    rate = jnp.maximum(1 / (1 + seen.astype(norm.dtype)), _RATE)
    median: Any = quantile(0.5, rate).update(norm, old.median)[1]
    multiple = norm / median.blocks.value
    trackers = zip(levels.values(), old.multiples, strict=True)
    return Trackers(median, tuple(quantile(q, rate).update(multiple, state)[1] for q, state in trackers))


def quantiles_of(levels: Mapping[str, float], now: Trackers) -> jax.Array:
    """The quantiles, one vector; zeros before the first norm."""
    median, seen = now.median.blocks.value, now.median.blocks.seen
    pairs = zip(levels.values(), now.multiples, strict=True)
    values = [median if q == 0.5 else median * state.blocks.value for q, state in pairs]
    return jnp.where(seen > 0, jnp.stack(values), 0) if values else jnp.zeros(0, median.dtype)


def named_candidates(candidates: Candidates) -> dict[str, optax.GradientTransformationExtraArgs]:
    """The thresholds to try, by name, in the order of the names; plain numbers are named by themselves.

    Raises:
      ValueError: for what is no threshold.
    """
    if not isinstance(candidates, Mapping):
        candidates = {f"{checked(c, 'watch', 'candidates'):g}": c for c in candidates}
    return {name: as_threshold(candidates[name], "watch", "candidates") for name in sorted(candidates)}


def fresh_shadows(candidates: Mapping[str, Any], norm: jax.Array) -> tuple:
    """The states of the candidates before the first norm."""
    return tuple(threshold.init(norm) for threshold in candidates.values())


def shadowed(candidates: Mapping[str, Any], norm, states: tuple, params, extra_args) -> tuple[jax.Array, tuple]:
    """Which candidates would clip this norm, one vector, and their new states."""
    pairs = zip(candidates.values(), states, strict=True)
    done = [threshold.update(norm, state, params, **extra_args) for threshold, state in pairs]
    new = tuple(hold_where_not_finite(norm, new, old) for (_, new), old in zip(done, states, strict=True))
    over = [(norm > bound) & jnp.isfinite(norm) for bound, _ in done]
    return (jnp.stack(over) if over else jnp.zeros(0, bool)), new
