"""Learns from the total norm: its quantiles, and what candidate thresholds would have done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import validate
from optaxclip.base import Threshold
from optaxclip.monitoring.state import Trackers
from optaxclip.thresholds.blocks import hold
from optaxclip.thresholds.convert import as_threshold

Candidates = Mapping[Any, Threshold] | Sequence[float]
Levels = Mapping[str, float]
Trials = Mapping[str, optax.GradientTransformationExtraArgs]

_RATE = 0.1
_RUN, _LONGEST_RUN = 8, 1000  # norms in a row that are unlikely by chance; where counting stops


def name_levels(quantiles: Iterable[float]) -> Levels:
    """Names the quantiles, in rising order.

    Raises:
      ValueError: for a quantile outside [0, 1].
    """
    if not isinstance(quantiles, Iterable):
        raise validate.fail("quantiles must be a list of numbers from 0 to 1", quantiles)
    levels = list(quantiles)
    for q in levels:
        validate.between(0, 1, quantiles=q)
    return {f"{q:g}": float(q) for q in sorted(levels)}


def update_trackers(levels: Levels, norm: jax.Array, old: Trackers) -> Trackers:
    """Updates the trackers with one more norm.

    The median's steps start large. They grow again while norms stay on one side of it, which eight
    in a row rarely do by chance. A high or low quantile tracked by itself would follow a change of
    scale slowly: the 5 % quantile rises by at most a twentieth of the rate. As a multiple of the
    median it moves with the median. While the median is moving, the multiples wait.
    """
    excess = jnp.maximum(jnp.abs(old.run) - _RUN, 0).astype(norm.dtype)
    rate = jnp.clip(_RATE * (1 + excess / 4), 1 / (1 + old.seen.astype(norm.dtype)), 1)
    median, seen = _track(old.median, old.seen, norm, np.asarray(0.5, norm.dtype), rate)
    # A tracker ignores infinity, which lets the multiples wait without a branch.
    wait = (excess > 0) | (old.seen < 2 * _RUN)
    multiple = jnp.where(wait, jnp.inf, norm / jnp.where(median > 0, median, 1))
    shares = np.array(list(levels.values()), norm.dtype)
    multiples, multiples_seen = _track(old.multiples, old.multiples_seen, multiple, shares, _RATE)
    return Trackers(median, seen, _count_run(norm, old), multiples, multiples_seen)


def _track(value, seen, norm, share, rate) -> tuple[jax.Array, jax.Array]:
    """Applies the rule of `thresholds.quantile`, C ← C · exp(η · (q - b)), with a varying rate η.

    The threshold itself would have to be built, and its rate checked, at every step.
    """
    moved = value * jnp.exp(rate * (share - (norm <= value).astype(norm.dtype)))
    fine = jnp.isfinite(norm) & (norm > 0)
    value = jnp.where(fine, jnp.where(seen == 0, norm, moved), value)
    return value, jnp.where(fine, optax.safe_increment(seen), seen)


def _count_run(norm: jax.Array, old: Trackers) -> jax.Array:
    """Counts the consecutive norms on one side of the median."""
    side = jnp.where(norm > old.median, 1, -1)
    run = jnp.where(side * old.run > 0, jnp.clip(old.run + side, -_LONGEST_RUN, _LONGEST_RUN), side)
    return jnp.where(jnp.isfinite(norm) & (norm > 0) & (old.seen > 0), run, old.run)


def name_candidates(candidates: Candidates) -> Trials:
    """Names the thresholds to try; a number is its own name.

    Raises:
      ValueError: for anything that is not a threshold.
    """
    if not isinstance(candidates, Mapping):
        listed = list(candidates) if isinstance(candidates, Iterable) else [None]
        numbers = [validate.to_concrete(x) for x in listed]
        # A tracer has no value to use as its name.
        if not all(map(validate.is_static, numbers)):
            must = "candidates must be a dict of name -> threshold, or a list of numbers"
            raise validate.fail(must, candidates)
        candidates = {f"{number:g}": number for number in numbers}
    return {str(name): as_threshold(candidates=threshold) for name, threshold in candidates.items()}


def start_candidates(trials: Trials, dtype) -> tuple:
    """Returns the states of the candidates before the first norm."""
    return tuple(threshold.init(jnp.zeros((), dtype)) for threshold in trials.values())


def try_candidates(
    trials: Trials, norm, states: tuple, params, extra_args
) -> tuple[jax.Array, tuple]:
    """Returns which candidates would clip this norm, (c,), and their new states."""
    over, new = [], []
    for threshold, old in zip(trials.values(), states, strict=True):
        bound, state = threshold.update(norm, old, params, **extra_args)
        # As in a clip, an infinite norm counts as not finite and not as clipped.
        over.append((norm > bound) & jnp.isfinite(norm))
        new.append(hold(threshold.init, norm, state, old))
    return (jnp.stack(over) if over else jnp.zeros(0, bool)), tuple(new)
