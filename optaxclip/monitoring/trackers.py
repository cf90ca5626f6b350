"""Quantiles in a number each, and thresholds in shadow: what learns of the norm, and touches nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.thresholds.combine import Threshold, as_threshold, checked, hold_where_not_finite
from optaxclip.thresholds.learned import LearnedState, number
from optaxclip.thresholds.quantile import quantile

Candidates = Mapping[str, Threshold] | Sequence[float]

_RATE = 0.1
_RUN, _LONG = 8, 1000


class Trackers(NamedTuple):
    """The median, and other quantiles as multiples of it.

    A high or low quantile that is tracked alone follows a change of scale slowly: the one of 5 % goes up by 1/20 of
    the rate at most. As a multiple of the median, which is quick both ways, it is there when the median is.

    Attributes:
      median: of the norms.
      multiples: of norms over the median.
      run: int32, the last norms without a break above the median; below it, negative.
    """

    median: LearnedState
    multiples: tuple[LearnedState, ...]
    run: jax.Array


def named_levels(quantiles: Iterable[float]) -> dict[str, float]:
    """The quantiles, by name, in the order of the names.

    Raises:
      ValueError: for one outside [0, 1].
    """
    levels = [float(number(q, "watch", "quantiles", 0.0, 1.0 + 1e-9)) for q in quantiles]
    return dict(sorted((f"{q:g}", q) for q in levels))


def fresh_trackers(levels: Mapping[str, float], norm: jax.Array) -> Trackers:
    """Trackers that have seen nothing; each array has a buffer of its own."""
    fresh: Any = quantile(0.5, _RATE).init
    return Trackers(fresh(norm), tuple(fresh(norm) for _ in levels), jnp.zeros((), jnp.int32))


def followed(levels: Mapping[str, float], norm: jax.Array, old: Trackers) -> Trackers:
    """The trackers after one more norm.

    Where the median is far off its steps grow: they start large, and they grow again while all norms are on one side
    of it, as eight in a row hardly are by chance. Meanwhile the multiples wait.
    """
    seen, lags = old.median.blocks.seen, jnp.maximum(jnp.abs(old.run) - _RUN, 0).astype(norm.dtype)
    rate = jnp.clip(_RATE * (1 + lags / 4), 1 / (1 + seen.astype(norm.dtype)), 1)
    median: Any = quantile(0.5, rate).update(norm, old.median)[1]
    multiple = jnp.where((lags > 0) | (seen < 2 * _RUN), jnp.nan, norm / median.blocks.value)
    trackers = zip(levels.values(), old.multiples, strict=True)
    multiples: Any = tuple(quantile(q, _RATE).update(multiple, state)[1] for q, state in trackers)
    return Trackers(median, multiples, _run(norm, old))


def _run(norm: jax.Array, old: Trackers) -> jax.Array:
    """How many norms were on this side of the median without a break; as it was, where there is nothing to learn."""
    side = jnp.where(norm > old.median.blocks.value, 1, -1)
    run = jnp.where(side * old.run > 0, jnp.clip(old.run + side, -_LONG, _LONG), side)
    return jnp.where(jnp.isfinite(norm) & (norm > 0) & (old.median.blocks.seen > 0), run, old.run)


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
    if isinstance(candidates, Mapping):
        named: dict[str, Any] = {str(name): threshold for name, threshold in candidates.items()}
    else:
        named = {f"{checked(c, 'watch', 'candidates'):g}": c for c in candidates}
    return {name: as_threshold(named[name], "watch", "candidates") for name in sorted(named)}


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
