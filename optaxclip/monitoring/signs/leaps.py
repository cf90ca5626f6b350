"""Weights that leap before the norms of gradients are large: a learning rate that is too high."""

from __future__ import annotations

import numpy as np

from optaxclip.monitoring.findings import Sign, format_number
from optaxclip.monitoring.fits import is_known
from optaxclip.monitoring.history import RecordedRun
from optaxclip.monitoring.limits import LARGE, LEAP, LEAP_STEPS, MOVED
from optaxclip.monitoring.signs.blocks import step_at
from optaxclip.monitoring.signs.rises import Rise


def find_leap(run: RecordedRun, rise: Rise | None) -> tuple[int, float] | None:
    """The step at which the weights leapt, and how far, before norms were large; None if not."""
    w = run.param_norms
    if len(w) < 3:
        return None
    # A leap behind a rise is its consequence: updates are as large as the gradients then.
    end = len(w) if rise is None else rise.start + 1
    steps = min(LEAP_STEPS, len(w) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (w[steps:] / w[:-steps])[:end]
    over = np.flatnonzero(ratios >= LEAP)
    if len(over) and _loss_is_worse(run, over[0]):
        return int(over[0]), float(ratios[over[0]])
    return None if rise is None else _find_lead(run.norms, w, rise)


def _find_lead(norms: np.ndarray, w: np.ndarray, rise: Rise) -> tuple[int, float] | None:
    """The same where norms and weights rise together: whether the weights were ahead."""
    # The norm at a step is that before its update; weights are recorded after it.
    large = np.flatnonzero(norms[rise.start : rise.end] >= LARGE * rise.usual)
    at = rise.start + int(large[0]) if len(large) else rise.end - 1
    before = w[max(at - 2 * LEAP_STEPS, 0) : at]
    before = before[is_known(before)]
    if not len(before) or before[-1] < MOVED * before[0]:
        return None
    grown = np.max(w[at : rise.end], where=np.isfinite(w[at : rise.end]), initial=0) / before[0]
    return (max(rise.start, 1) - 1, float(grown)) if grown >= LEAP else None


def _loss_is_worse(run: RecordedRun, at: int) -> bool:
    """Whether the loss ends above where it was: weights that start at zero grow with it falling."""
    if not len(run.losses):
        return False
    before, after = run.losses[: max(at, 3)], run.losses[-max(len(run.losses) // 4, 3) :]
    known = before[np.isfinite(before)]
    return not np.isfinite(after).all() or (
        len(known) > 0 and np.median(after) > known.min() * 1.05
    )


def too_high(run: RecordedRun, at: int, grown: float) -> Sign:
    step = step_at(run, at)
    return Sign(
        "learning-rate-too-high",
        f"from step {step} on gradients of usual norm move the weights"
        f" {format_number(grown)}-fold.",
        {"growth": grown, "first": at},
        "a tenth of the learning rate, or a warm-up if it is at the start of the run. A lower bound"
        " would hide it, and not under Adam, which does not see the scale of gradients.",
        step,
    )
