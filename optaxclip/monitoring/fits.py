"""The statistics that the rules of `diagnose` use, all linear in the number of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.monitoring import limits

# Stands for a key that a row lacks. It is a NaN like any other except for its bits, so that a loss
# that was NaN can be told from one that was not recorded. R marks NA in the same way.
_BITS = np.uint64(0x7FF80000000007A2)
MISSING = float(_BITS.view(np.float64))


class Fit(NamedTuple):
    """An exponential fit: its growth over the steps, and the share of the variance it explains."""

    growth: float
    r2: float
    steps: int


def fit_growth(x: np.ndarray) -> Fit:
    """Fits an exponential to a positive series."""
    y, t = np.log(x), np.arange(len(x)) - (len(x) - 1) / 2
    # Written out, because `polyfit` would solve a system for each of the pieces that are tried.
    slope = np.dot(t, y) / np.dot(t, t)
    rest = y - y.mean() - slope * t
    whole = np.sum(np.square(y - y.mean()))
    # Within the range of float64, so that the growth of a short, steep piece stays finite.
    log_growth = np.clip(slope * (len(x) - 1), -700, 700)
    r2 = 1 - np.sum(np.square(rest)) / whole if whole else 0.0
    return Fit(float(np.exp(log_growth)), float(r2), len(x))


def is_known(x: np.ndarray) -> np.ndarray:
    """Returns where norms are finite and positive."""
    return np.isfinite(x) & (x > 0)


def is_recorded(x: np.ndarray) -> np.ndarray:
    """Returns where a number was recorded, NaN or not.

    >>> is_recorded(np.array([1.0, np.nan, MISSING]))
    array([ True,  True, False])
    """
    return np.ascontiguousarray(x).view(np.uint64) != _BITS


def guess_recorded(x: np.ndarray) -> np.ndarray:
    """Guesses where a number was recorded: everywhere, or at every k-th row only.

    In a column from elsewhere a NaN may be a number or a gap. What is known only k rows apart was
    not NaN in between.

    >>> guess_recorded(np.array([1.0, np.nan, 2.0, np.nan, 3.0, np.nan, np.nan]))
    array([ True, False,  True, False,  True, False,  True])
    """
    known = np.flatnonzero(np.isfinite(x))
    gaps = np.bincount(np.diff(known), minlength=2)
    every = int(np.argmax(gaps))
    if len(known) < 3 or every < 2 or gaps[every] < limits.REGULAR * gaps.sum():
        return np.ones(len(x), bool)
    phase = np.argmax(np.bincount(known % every))
    return (np.arange(len(x)) % every == phase) | ~np.isnan(x)


def find_runs(where: np.ndarray) -> list[tuple[int, int]]:
    """Finds stretches of consecutive true steps: the first step of each, and the one after its end.

    >>> find_runs(np.array([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(np.r_[False, where, False].astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def zeros_at_end(x: np.ndarray) -> int:
    """Counts the zeros at the end of a series."""
    other = np.flatnonzero(x != 0)
    return len(x) - 1 - int(other[-1]) if len(other) else len(x)


def _medians_before(x: np.ndarray) -> np.ndarray:
    """Returns the median of the steps before each step; NaN where there are none."""
    count = min(limits.NEIGHBOURS, len(x))
    few = np.array([np.median(x[:i]) if i else np.nan for i in range(count)])
    if len(x) <= limits.NEIGHBOURS:
        return few
    windows = np.lib.stride_tricks.sliding_window_view(x[:-1], limits.NEIGHBOURS)
    return np.r_[few, np.median(windows, axis=1)]


def over_neighbours(x: np.ndarray) -> np.ndarray:
    """Divides each norm by the larger of the medians before and after it.

    Where the level changes, neither side stands out.

    Args:
      x: (steps,), finite and positive.
    """
    before, after = _medians_before(x), _medians_before(x[::-1])[::-1]
    return x / np.fmax(before, after) if len(x) > 1 else np.ones(len(x))


def large_ratio(ratios: np.ndarray, steps: int) -> float:
    """Returns the ratio to the median that noise does not reach within a number of steps.

    Args:
      ratios: norms over the medians around them.
      steps: the number of steps.
    """
    if len(ratios) < limits.ENOUGH:
        return limits.LARGE_UNKNOWN
    middle, high = np.quantile(ratios, (0.5, 0.9))
    # For a power law x^-a, ln(5) / ln(high / middle) is a. It uses quantiles, so that up to a tenth
    # of the steps may be spikes themselves.
    power = np.log(high / middle) / np.log(5)
    large = high * (0.1 * steps / limits.CHANCE) ** power
    return float(np.clip(large, limits.LARGE, limits.LARGE_FOR_SURE))


def find_shift(y: np.ndarray) -> int:
    """Finds the step that best splits a series into two levels, by least squares."""
    n = np.arange(1, len(y))
    sums = np.cumsum(y - y.mean())[:-1]
    return int(np.argmax(np.square(sums) / (n * (len(y) - n)))) + 1


def compare_parts(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Returns the medians of two parts of a series, and the standard error of their difference."""
    # Medians, because one spike moves a mean by more than the difference that is sought.
    spread = float(np.mean([_spread(a), _spread(b)]))
    return float(np.median(a)), float(np.median(b)), _error(spread, len(a), len(b))


def _spread(x: np.ndarray) -> float:
    """Returns the standard deviation of normal noise that has the same median deviation."""
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))


def _error(spread: float, *counts: int) -> float:
    """Returns the standard error of a difference of medians: 1.25 times that of means."""
    return 1.25 * spread * float(np.sqrt(sum(1 / max(n, 1) for n in counts)))


def fell_early(x: np.ndarray) -> bool:
    """Whether a series was higher at first than in its second half.

    >>> fell_early(np.r_[3.0, 2.0, 1.5, np.ones(60)]), fell_early(np.ones(63))
    (True, False)
    """
    late = x[len(x) // 2 :]
    usual, spread = float(np.median(late)), _spread(late)
    for first in (3, max(len(x) // 20, 3)):
        start, error = float(np.median(x[:first])), _error(spread, first, len(late))
        if start - usual > max(limits.UNMOVED * abs(start), limits.RISEN_ERRORS * error):
            return True
    # It may have fallen within a row: then the first stands out farther than noise ever does.
    farthest = max(limits.UNMOVED * abs(x[0]), limits.ALONE * (late.max() - usual))
    return bool(x[0] - usual > farthest)


def tail_index(ratios: np.ndarray) -> float:
    """Hill's estimate a from the largest tenth, for a tail P(x > s) that falls like s^-a."""
    top = np.sort(ratios)[-max(len(ratios) // 10, 2) :]
    return 1 / max(float(np.mean(np.log(top[1:] / top[0]))), 1e-30)
