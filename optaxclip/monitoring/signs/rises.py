"""Finds where norms rise: to another level, or to the end of a run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.fits import (
    Fit,
    find_runs,
    find_shift,
    fit_growth,
    is_known,
    large_ratio,
    over_neighbours,
    zeros_at_end,
)


class Rise(NamedTuple):
    """Norms that rose.

    Attributes:
      start: the first step of the rise.
      end: the step after the rise: the first that is not finite, or at the new level.
      usual, peak: the norm before the rise, and the largest norm.
      how: "broke": it ended in NaN, infinity or zeros; "stays" at the new level; "grows" at the end
        of the record.
    """

    start: int
    end: int
    usual: float
    peak: float
    how: str


def find_rise(x: np.ndarray) -> Rise | None:
    """Finds the first rise that breaks the run, or else one to a new level or to the last step."""
    lost = find_runs(is_lost(x))
    known = x[is_known(x)]
    limit = large_ratio(over_neighbours(known), 3)
    begins = [0, *(end for _, end in lost)]
    for begin, (at, _) in zip(begins, lost, strict=False):
        if found := _rise_to(x, begin, at, limit):
            return found
    # After norms are lost for good, the weights are broken, and later norms mean nothing.
    where = np.flatnonzero(is_known(x[: lost[-1][0]] if lost and lost[-1][1] == len(x) else x))
    level = _shift(x, where)
    if level and not _is_steep_after(x[where[where >= level.end - 1]]):
        return level
    # If it slows down before the last step, it has reached a level after all.
    return _growing(x, where) or level


def is_lost(x: np.ndarray) -> np.ndarray:
    """Returns where norms are not finite, or zero to the end, as in units that saturated."""
    lost = ~np.isfinite(x)
    lost[len(x) - zeros_at_end(x) :] |= zeros_at_end(x) >= limits.ENOUGH
    return lost


def _rise_to(x: np.ndarray, begin: int, at: int, limit: float) -> Rise | None:
    """Finds the rise at the end of the steps from `begin` to `at`, where the norm breaks."""
    where = begin + np.flatnonzero(is_known(x[begin:at]))
    if len(where) < 2:
        return None
    y = x[where]
    # A quartile, because a slow rise from the first step on may be half of the record.
    usual, peak = np.quantile(y[:-1], 0.25, method="lower"), y[-3:].max()
    if peak < limit * usual:
        return None
    low = np.flatnonzero(y <= usual * min(limit, (peak / usual) ** 0.1))
    first = low[-1] + 1
    heights = np.log(y[first:] / usual) / np.log(peak / usual)
    if len(heights) == 0 or (len(heights) > 5 and heights.mean() > limits.STILL_RISING):
        return None
    return Rise(int(where[_foot(y, first)]), at, float(usual), float(peak), "broke")


def _foot(y: np.ndarray, first: int) -> int:
    """Finds where a rise began that stands out of the noise at step `first`.

    The step before belongs to it if it exceeds all steps before, and their median by at least half
    of the rise to the next step, on a log scale.
    """
    while first > 1:
        before, low, high = y[: first - 1][-limits.NEIGHBOURS :], y[first - 1], y[first]
        if low >= high or low <= before.max() or low < np.median(before) * np.sqrt(high / low):
            break
        first -= 1
    return first


def _shift(x: np.ndarray, where: np.ndarray) -> Rise | None:
    """Finds a change to a level that lasts until the end."""
    if len(where) < limits.ENOUGH:
        return None
    y = np.log(x[where])
    split = find_shift(y)
    before, after = y[:split], y[split:]
    high, apart = np.median(after), np.quantile(after, 0.1) > np.quantile(before, 0.9)
    small = high - np.median(before) < np.log(limits.JUMP)
    if small or not apart or min(len(before), len(after)) < 5:
        return None
    # A quartile, as above: much of a slow rise lies before the split.
    low = np.quantile(before, 0.25)
    # Noise does not matter between a quarter and three quarters of the way. From the split on
    # outwards, because single steps before it may be as large as the level after it.
    start = int(np.flatnonzero(before <= low + 0.25 * (high - low))[-1]) + 1
    top = start + int(np.argmax(y[start:] >= low + 0.75 * (high - low)))
    usual, peak = float(np.exp(np.median(y[:start]))), float(np.exp(high))
    return Rise(int(where[_foot(x[where], start)]), int(where[top]) + 1, usual, peak, "stays")


def _growing(x: np.ndarray, where: np.ndarray) -> Rise | None:
    """Finds exponential growth in the last half, quarter, ..., because explosions are short."""
    y = x[where]
    sizes = [len(y) >> halvings for halvings in range(20)]
    fits = [fit_growth(y[-size:]) for size in sizes if size >= limits.RISE_STEPS]
    # The second half must have its part of the growth; otherwise it is over, or is a warm-up.
    steep = [
        fit
        for fit in fits
        if _is_steep(fit) and np.median(y[-3:]) / y[-fit.steps // 2] >= fit.growth**0.35
    ]
    if not steep:
        return None
    fit = max(steep, key=lambda fit: fit.r2)
    peak = float(y[-1])
    return Rise(int(where[-fit.steps]), len(x), peak / fit.growth, peak, "grows")


def _is_steep_after(y: np.ndarray) -> bool:
    return len(y) >= limits.RISE_STEPS and _is_steep(fit_growth(y))


def _is_steep(fit: Fit) -> bool:
    return fit.growth >= limits.RISE and fit.r2 >= limits.RISE_R2
