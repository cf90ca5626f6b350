"""The statistics on which the rules of `diagnose` rest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """An exponential fit: its growth over the steps, and the share of variance it explains."""

    growth: float
    r2: float
    steps: int

    def evidence(self) -> dict[str, float]:
        """The numbers of the fit, by name."""
        doubling = np.log(2) * (self.steps - 1) / np.log(self.growth)
        return {
            "growth": self.growth,
            "doubling_steps": doubling,
            "r2": self.r2,
            "steps": self.steps,
        }


def fit_growth(x: np.ndarray) -> Fit:
    """Fits an exponential to a positive series."""
    y, t = np.log(x), np.arange(len(x)) - (len(x) - 1) / 2
    slope = np.dot(t, y) / np.dot(t, t)
    rest = y - y.mean() - slope * t
    whole = np.sum(np.square(y - y.mean()))
    return Fit(
        float(np.exp(slope * (len(x) - 1))),
        float(1 - np.sum(np.square(rest)) / whole) if whole else 0.0,
        len(x),
    )


def keep_positive(x: np.ndarray) -> np.ndarray:
    """The finite and positive values up to the first that is not finite, where a run has ended."""
    bad = np.flatnonzero(~np.isfinite(x))
    # Eight values make a fit. Earlier NaNs are skipped steps, after which the run went on.
    x = x[: bad[0]] if len(bad) and bad[0] >= 8 else x[np.isfinite(x)]
    return x[x > 0]


def compare_halves(x: np.ndarray) -> tuple[float, float, float]:
    """The medians of both halves, and the standard error of their difference."""
    a, b = np.array_split(x, 2)
    spread = 1.4826 * np.mean([np.median(np.abs(half - np.median(half))) for half in (a, b)])
    return (
        float(np.median(a)),
        float(np.median(b)),
        float(1.25 * spread * np.sqrt(2 / max(len(b), 1))),
    )
