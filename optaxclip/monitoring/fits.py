"""The statistics on which the rules of `diagnose` rest: linear in the number of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.limits import (
    CHANCE,
    ENOUGH,
    LARGE,
    LARGE_FOR_SURE,
    LARGE_UNKNOWN,
    NEIGHBOURS,
)


class Fit(NamedTuple):
    """An exponential fit: its growth over the steps, and the share of variance it explains."""

    growth: float
    r2: float
    steps: int


def fit_growth(x: np.ndarray) -> Fit:
    """Fits an exponential to a positive series."""
    y, t = np.log(x), np.arange(len(x)) - (len(x) - 1) / 2
    # By hand: `polyfit` solves a system for each of the pieces that are tried.
    slope = np.dot(t, y) / np.dot(t, t)
    rest = y - y.mean() - slope * t
    whole = np.sum(np.square(y - y.mean()))
    # Between the ends of float64, so that the growth of a steep and short piece is a number.
    log_growth = np.clip(slope * (len(x) - 1), -700, 700)
    r2 = 1 - np.sum(np.square(rest)) / whole if whole else 0.0
    return Fit(float(np.exp(log_growth)), float(r2), len(x))


def is_known(x: np.ndarray) -> np.ndarray:
    """Where a norm is finite and not zero."""
    return np.isfinite(x) & (x > 0)


def find_runs(where: np.ndarray) -> list[tuple[int, int]]:
    """The first step of each stretch of consecutive true steps, and the step after its last.

    >>> find_runs(np.array([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(np.r_[False, where, False].astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def zeros_at_end(x: np.ndarray) -> int:
    """How many of the last steps are zero."""
    other = np.flatnonzero(x != 0)
    return len(x) - 1 - int(other[-1]) if len(other) else len(x)


def medians_around(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each step the median of those before and of those after; NaN where there are none."""
    return _medians_before(x), _medians_before(x[::-1])[::-1]


def _medians_before(x: np.ndarray) -> np.ndarray:
    few = np.array([np.median(x[:i]) if i else np.nan for i in range(min(NEIGHBOURS, len(x)))])
    if len(x) <= NEIGHBOURS:
        return few
    windows = np.lib.stride_tricks.sliding_window_view(x[:-1], NEIGHBOURS)
    return np.r_[few, np.median(windows, axis=1)]


def over_neighbours(x: np.ndarray) -> np.ndarray:
    """Each norm over the larger of both medians: where a level changes, neither side stands out.

    Args:
      x: (steps,), finite and positive.
    """
    before, after = medians_around(x)
    return x / np.fmax(before, after) if len(x) > 1 else np.ones(len(x))


def large_ratio(ratios: np.ndarray, steps: int) -> float:
    """How many medians a norm must have so that noise does not reach it within so many steps.

    Args:
      ratios: norms over medians around them.
      steps: among how many the largest is sought.
    """
    if len(ratios) < ENOUGH:
        return LARGE_UNKNOWN
    middle, high = np.quantile(ratios, (0.5, 0.9))
    # Of a power law x^-a, ln(5) / ln(high / middle) is a: quantiles, so that up to a tenth of the
    # steps may be the spikes themselves.
    power = np.log(high / middle) / np.log(5)
    return float(np.clip(high * (0.1 * steps / CHANCE) ** power, LARGE, LARGE_FOR_SURE))


def find_shift(y: np.ndarray) -> int:
    """The step at which a series splits best into two levels, by least squares."""
    n = np.arange(1, len(y))
    sums = np.cumsum(y - y.mean())[:-1]
    return int(np.argmax(np.square(sums) / (n * (len(y) - n)))) + 1


def compare_parts(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The medians of two parts of a series, and the standard error of their difference."""
    # Medians throughout: one spike moves a mean more than what is sought. Of normal noise 1.4826
    # times this is the standard deviation, and a median has 1.25 times the error of a mean.
    spread = 1.4826 * np.mean([np.median(np.abs(part - np.median(part))) for part in (a, b)])
    error = 1.25 * spread * np.sqrt(1 / max(len(a), 1) + 1 / max(len(b), 1))
    return float(np.median(a)), float(np.median(b)), float(error)


def tail_index(ratios: np.ndarray) -> float:
    """Hill's estimate from the largest tenth: P(x > s) falls as s to minus this power."""
    top = np.sort(ratios)[-max(len(ratios) // 10, 2) :]
    return 1 / max(float(np.mean(np.log(top[1:] / top[0]))), 1e-30)
