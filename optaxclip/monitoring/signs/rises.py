"""Where norms rise to another level, or to the end of a run; and whether the weights led."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.findings import Sign, format_number
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
from optaxclip.monitoring.history import RecordedRun
from optaxclip.monitoring.limits import (
    ENOUGH,
    FIRST_NORM,
    FIRST_STEPS,
    JUMP,
    JUMP_STEPS,
    LARGE,
    LEAP,
    LEAP_STEPS,
    MOVED,
    RISE,
    RISE_R2,
    RISE_STEPS,
    STILL_RISING,
)
from optaxclip.monitoring.signs.blocks import first_large, in_block, step_at


class Rise(NamedTuple):
    """Norms that rose.

    Attributes:
      start: the first step of the rise.
      end: the step after it: the first that is not finite, or at the new level.
      usual, peak: the norm before, and the largest.
      how: "broke": it ended in NaN, infinity or zeros; "stays"; "grows", at the end of the record.
    """

    start: int
    end: int
    usual: float
    peak: float
    how: str


def find_rise(x: np.ndarray) -> Rise | None:
    """The first rise to an end of it all; if none, one to another level, or until the last step."""
    lost = find_runs(is_lost(x))
    known = x[is_known(x)]
    limit = large_ratio(over_neighbours(known), 3)
    begins = [0, *(end for _, end in lost)]
    for begin, (at, _) in zip(begins, lost, strict=False):
        if found := _rise_to(x, begin, at, limit):
            return found
    # What comes after the first lasting loss is of weights that are lost.
    where = np.flatnonzero(is_known(x[: lost[-1][0]] if lost and lost[-1][1] == len(x) else x))
    return _shift(x, where) or _growing(x, where)


def is_lost(x: np.ndarray) -> np.ndarray:
    """Where norms are not finite; and at the end zero, as of units that an explosion saturated."""
    lost = ~np.isfinite(x)
    lost[len(x) - zeros_at_end(x) :] |= zeros_at_end(x) >= ENOUGH
    return lost


def _rise_to(x: np.ndarray, begin: int, at: int, limit: float) -> Rise | None:
    """The rise that the steps from `begin` end with, where the norm breaks at step `at`."""
    where = begin + np.flatnonzero(is_known(x[begin:at]))
    if len(where) < 2:
        return None
    y = x[where]
    # A quartile: a slow rise from the first step on is half of the record.
    usual, peak = np.quantile(y[:-1], 0.25, method="lower"), y[-3:].max()
    if peak < limit * usual:
        return None
    low = np.flatnonzero(y <= usual * min(limit, (peak / usual) ** 0.1))
    first = low[-1] + 1
    heights = np.log(y[first:] / usual) / np.log(peak / usual)
    if len(heights) == 0 or (len(heights) > 5 and heights.mean() > STILL_RISING):
        return None
    return Rise(int(where[first]), at, float(usual), float(peak), "broke")


def _shift(x: np.ndarray, where: np.ndarray) -> Rise | None:
    """A change to a level that lasts until the end."""
    if len(where) < ENOUGH:
        return None
    y = np.log(x[where])
    split = find_shift(y)
    before, after = y[:split], y[split:]
    low, high = np.median(before), np.median(after)
    apart = np.quantile(after, 0.1) > np.quantile(before, 0.9)
    if high - low < np.log(JUMP) or not apart or min(len(before), len(after)) < 5:
        return None
    # Between a quarter and three quarters of the way noise is no matter.
    top = int(np.argmax(y >= low + 0.75 * (high - low)))
    if len(y) - top >= RISE_STEPS and _is_steep(fit_growth(np.exp(y[top:] - y[top]))):
        return None
    start = int(np.flatnonzero(y[: top + 1] <= low + 0.25 * (high - low))[-1]) + 1
    usual, peak = float(np.exp(low)), float(np.exp(high))
    return Rise(int(where[start]), int(where[top]) + 1, usual, peak, "stays")


def _growing(x: np.ndarray, where: np.ndarray) -> Rise | None:
    """Exponential growth at the end: over the last half, quarter, ..., as explosions are short."""
    y = x[where]
    sizes = [len(y) >> halvings for halvings in range(20) if len(y) >> halvings >= RISE_STEPS]
    fits = [fit_growth(y[-size:]) for size in sizes]
    # The latter half has its part of it: otherwise it has ended, or is a warm-up.
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


def _is_steep(fit: Fit) -> bool:
    return fit.growth >= RISE and fit.r2 >= RISE_R2


def rising(run: RecordedRun) -> Iterator[Sign]:
    """An explosion, a lasting jump, or a learning rate that makes the weights jump."""
    rise = find_rise(run.norms)
    leap = _find_leap(run, rise)
    if leap is not None:
        yield _too_high(run, *leap)
    elif rise is not None:
        yield _exploding(run, rise)
    elif (end := _end_of_first(run.norms)) is not None:
        yield _exploding_at_once(run, end)


def _end_of_first(x: np.ndarray) -> int | None:
    """Where all ends after a first step or two of large gradients, to which nothing compares."""
    lost = find_runs(is_lost(x))
    if not lost or lost[0][1] < len(x) or not 1 <= lost[0][0] <= FIRST_STEPS:
        return None
    return lost[0][0] if x[: lost[0][0]].max() >= FIRST_NORM else None


def _exploding_at_once(run: RecordedRun, end: int) -> Sign:
    at = int(np.argmax(run.norms[:end]))
    norm, step, after = float(run.norms[at]), step_at(run, at), step_at(run, end)
    largest = {name: x[at] for name, x in run.blocks.items() if np.isfinite(x[at])}
    block = max(largest, key=lambda name: largest[name]) if len(largest) > 1 else ""
    how = "zero" if run.norms[end] == 0 else "not finite"
    return Sign(
        "norms-exploding",
        f"the norm is {format_number(norm)} at step {step}, and {how} from step {after} on"
        f"{in_block(block)}.",
        {"norm": norm, "first": at},
        "a clip from the first step on, optaxclip.clip_by_global_norm(1.0), and an initialization"
        " that keeps the scale: orthogonal in a recurrent network, He for ReLU.",
        step,
        block,
    )


def _find_leap(run: RecordedRun, rise: Rise | None) -> tuple[int, float] | None:
    """The step at which the weights leapt, and how far, before norms were large; None if not."""
    w = run.param_norms
    if w is None or len(w) < 3:
        return None
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
    if run.losses is None:
        return False
    before, after = run.losses[: max(at, 3)], run.losses[-max(len(run.losses) // 4, 3) :]
    known = before[np.isfinite(before)]
    return not np.isfinite(after).all() or (
        len(known) > 0 and np.median(after) > known.min() * 1.05
    )


def _too_high(run: RecordedRun, at: int, grown: float) -> Sign:
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


def _exploding(run: RecordedRun, rise: Rise) -> Sign:
    growth, steps = rise.peak / rise.usual, rise.end - rise.start
    block = first_large(run, rise.start, rise.end)
    step, fold = step_at(run, rise.start), format_number(growth)
    evidence = {"growth": growth, "steps": steps, "usual": rise.usual, "first": rise.start}
    levels = f"from {format_number(rise.usual)} to {format_number(rise.peak)}"
    if rise.how == "stays" and steps <= JUMP_STEPS:
        what = f"the norm jumps {fold}-fold at step {step}, {levels}, and stays there"
        what = f"{what}{in_block(block)}."
        fix = (
            "compare the data, the loss scale and the learning rate on both sides of this step, and"
            " go back to a checkpoint before it; clip_by_median() keeps such a jump out."
        )
        return Sign("norms-jumped", what, evidence, fix, step, block)
    # Of a rise that goes on the last step is one of it, and there is one interval less.
    intervals = steps - (rise.how == "grows")
    evidence["doubling_steps"] = float(np.log(2) * intervals / np.log(growth))
    end = {"stays": ", and stays there", "grows": ", and still grows"}.get(rise.how)
    if not end:
        how = "zero" if run.norms[rise.end] == 0 else "not finite"
        end = f", and is {how} at step {step_at(run, rise.end)}"
    what = f"the norm grows {fold}-fold within {steps} steps from step {step} on, {levels}{end}"
    fix = _stop_explosion(run, rise)
    return Sign("norms-exploding", f"{what}{in_block(block)}.", evidence, fix, step, block)


def _stop_explosion(run: RecordedRun, rise: Rise) -> str:
    """What to do: by when it began, and whether a clip was there."""
    clipped = any(clip["clipped"][rise.start : rise.end].any() for clip in run.clips.values())
    if rise.start <= ENOUGH:
        return (
            "a lower learning rate, or a longer warm-up: it began with the run. In a recurrent"
            " network orthogonal initialization, or shorter sequences."
        )
    if clipped:
        return (
            "go back to a checkpoint before this step, with a lower learning rate: the clip was"
            " active, and direction, not length, led there."
        )
    return (
        f"a clip at the usual norm, optaxclip.clip_by_global_norm({format_number(rise.usual)}), or"
        " optaxclip.zclip(), which finds it; from a checkpoint before this step."
    )
