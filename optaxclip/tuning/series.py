"""Statistics of a recorded series of norms: its tail, its drift, the scales of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.fits import is_known

# With fewer steps, a tail or a drift cannot be told from noise.
FEWEST = 20


class Numbers(NamedTuple):
    """The statistics behind a recommendation.

    Attributes:
      steps: the steps recorded.
      nonfinite, zeros: how many of them had a norm that is NaN or infinite, or zero.
      median: the median of all other norms.
      tail_ratio, spike_ratio: the 99th percentile and the largest norm, divided by the median,
        after the drift is removed.
      tail_index: Hill's estimate α from the largest twentieth, P(n > x) ~ x^(-α): below 2 the
        variance is infinite.
      drift: the factor by which norms change from one end of the run to the other, fitted on a log
        scale without the first tenth.
      drift_noise: the standard error of the drift as a factor, from the medians of ten stretches.
      scale_ratio: the largest median norm of a layer divided by the smallest; NaN without layers.
    """

    steps: int
    nonfinite: int
    zeros: int
    median: float
    tail_ratio: float
    spike_ratio: float
    tail_index: float
    drift: float
    drift_noise: float
    scale_ratio: float


def measure_series(norms: np.ndarray, layers: Mapping[str, np.ndarray]) -> Numbers:
    """Computes the statistics of the norms of the whole gradient and of its layers."""
    # Zeros have no logarithm and are counted separately.
    known = is_known(norms)
    counts = len(norms), int(np.sum(~np.isfinite(norms))), int(np.sum(norms == 0))
    scales = [np.median(x[is_known(x)]) for x in layers.values() if is_known(x).any()]
    scale_ratio = float(max(scales) / min(scales)) if scales else np.nan
    if known.sum() < FEWEST:
        median = float(np.median(norms[known])) if known.any() else np.nan
        return Numbers(*counts, median, np.nan, np.nan, np.nan, np.nan, np.nan, scale_ratio)
    time, logs = log_known(norms)
    # On logs, because norms are positive and skewed, and a drift is a factor.
    slope, noise = _fit_drift(time, logs)
    level = logs - slope * time
    level = np.sort(level - np.median(level))
    ratios = float(np.exp(np.quantile(level, 0.99))), float(np.exp(level[-1]))
    factors = float(np.exp(slope)), float(np.exp(noise))
    return Numbers(
        *counts,
        float(np.median(norms[known])),
        *ratios,
        _estimate_tail(level),
        *factors,
        scale_ratio,
    )


def _fit_drift(time: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    """Fits the slope of the log norm over the run, without the first tenth, and its standard error.

    Fits a line through the medians of ten stretches: spikes do not move the medians, and
    neighbouring steps, which are correlated, do not count as independent observations.
    """
    # Norms fall in the first steps of most runs, which is not a drift.
    late = time >= 0.1
    stretches = np.array_split(np.flatnonzero(late), 10)
    t = np.array([time[part].mean() for part in stretches])
    y = np.array([np.median(logs[part]) for part in stretches])
    centred = t - t.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / (len(t) - 2) / (centred @ centred)))


def _estimate_tail(logs: np.ndarray) -> float:
    """Estimates the tail index from the largest twentieth of sorted logs, at least five of them."""
    count = max(len(logs) // 20, 5)
    # Hill's estimator is the mean log excess over the largest value that is not in the tail.
    excess = float(np.mean(logs[-count:] - logs[-count - 1]))
    return 1 / excess if excess > 0 else np.inf


def log_known(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Takes logs of the norms that are finite and not zero, with the time of each from 0 to 1."""
    logs = np.log(norms[is_known(norms)])
    return np.arange(len(logs)) / max(len(logs) - 1, 1), logs
