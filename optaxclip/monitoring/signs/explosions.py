"""Finds explosions, lasting jumps, or learning rates that make the weights jump, in one rule."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_number
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.fits import find_runs, is_known
from optaxclip.monitoring.recorded import RecordedRun
from optaxclip.monitoring.signs.blocks import first_large, in_block, step_at
from optaxclip.monitoring.signs.rises import Rise, find_rise, is_lost


def rising(run: RecordedRun) -> Iterator[Sign]:
    """Finds an explosion, a lasting jump, or a learning rate that makes the weights jump."""
    rise = find_rise(run.norms)
    leap = _find_leap(run, rise)
    if leap is not None:
        yield _too_high(run, *leap)
    elif rise is not None:
        yield _exploding(run, rise)
    elif not run.begins_late and (end := _end_of_first(run.norms)) is not None:
        yield _exploding_at_once(run, end)


def _end_of_first(x: np.ndarray) -> int | None:
    """Finds where a run ends after large gradients at its first steps, before any usual norm."""
    lost = find_runs(is_lost(x))
    if not lost or lost[0][1] < len(x) or not 1 <= lost[0][0] <= limits.FIRST_STEPS:
        return None
    return lost[0][0] if x[: lost[0][0]].max() >= limits.FIRST_NORM else None


def _name_end(run: RecordedRun, at: int) -> str:
    return "zero" if run.norms[at] == 0 else "not finite"


def _exploding_at_once(run: RecordedRun, end: int) -> Sign:
    # There is no usual norm yet, so the size is the evidence, and the largest block is named.
    at = int(np.argmax(run.norms[:end]))
    norm, step, after = float(run.norms[at]), step_at(run, at), step_at(run, end)
    largest = {name: x[at] for name, x in run.blocks.items() if np.isfinite(x[at])}
    block = max(largest, key=lambda name: largest[name]) if len(largest) > 1 else ""
    return Sign(
        "norms-exploding",
        f"the norm is {format_number(norm)} at step {step}, and {_name_end(run, end)} from step"
        f" {after} on{in_block(block)}.",
        {"norm": norm, "first": at},
        "a clip from the first step on, optaxclip.clip_by_global_norm(1.0), and an initialization"
        " that keeps the scale: orthogonal in a recurrent network, He for ReLU.",
        step,
        block,
    )


def _exploding(run: RecordedRun, rise: Rise) -> Sign:
    growth, how = rise.peak / rise.usual, rise.how
    # Not the number of rows, of which there may be one in every hundred steps.
    intervals = int(run.steps[min(rise.end, len(run.steps) - 1)]) - step_at(run, rise.start)
    # A rise that still grows includes the last step, so it has one interval fewer.
    steps = intervals + (how == "grows")
    block = first_large(run, rise.start, rise.end)
    step, fold = step_at(run, rise.start), format_number(growth)
    evidence = {"growth": growth, "steps": steps, "usual": rise.usual, "first": rise.start}
    levels = f"from {format_number(rise.usual)} to {format_number(rise.peak)}"
    if how == "stays" and rise.end - rise.start <= limits.JUMP_STEPS:
        what = f"the norm jumps {fold}-fold at step {step}, {levels}, and stays there"
        what = f"{what}{in_block(block)}."
        fix = (
            "compare the data, the loss scale and the learning rate on both sides of this step, and"
            " go back to a checkpoint before it; clip_by_median() keeps such a jump out."
        )
        return Sign("norms-jumped", what, evidence, fix, step, block)
    evidence["doubling_steps"] = float(np.log(2) * intervals / np.log(growth))
    end = {"stays": ", and stays there", "grows": ", and still grows"}.get(how)
    if not end:
        end = f", and is {_name_end(run, rise.end)} at step {step_at(run, rise.end)}"
    what = f"the norm grows {fold}-fold within {steps} steps from step {step} on, {levels}{end}"
    fix = _stop_explosion(run, rise)
    return Sign("norms-exploding", f"{what}{in_block(block)}.", evidence, fix, step, block)


def _stop_explosion(run: RecordedRun, rise: Rise) -> str:
    """Says what to try, given when the rise began and whether a clip was active."""
    # Scaling does not change a wrong direction, so another bound would only delay the explosion.
    clips = run.measuring_clips().values()
    clipped = any(clip["clipped"][rise.start : rise.end].any() for clip in clips)
    if rise.start <= limits.ENOUGH and not run.begins_late:
        return (
            "a lower learning rate, or a longer warm-up: it began with the run. In a recurrent"
            " network, orthogonal initialization or shorter sequences."
        )
    if clipped:
        return (
            "go back to a checkpoint before this step, with a lower learning rate: the clip was"
            " active, so the direction and not the length of the updates led there."
        )
    # zclip gets a cap, because it has no bound during its warm-up, when the explosion may happen.
    cap = format_number(10 * rise.usual)
    return (
        f"a clip at the usual norm, optaxclip.clip_by_global_norm({format_number(rise.usual)}), or"
        f" optaxclip.zclip(max_norm={cap}), which learns it; from a checkpoint before this step."
    )


def _find_leap(run: RecordedRun, rise: Rise | None) -> tuple[int, float] | None:
    """Finds the step at which the weights leapt before norms were large, and how far; or None."""
    w = run.param_norms
    if len(w) < 3:
        return None
    # A leap after a rise is its consequence, because the updates are as large as the gradients.
    end = len(w) if rise is None else rise.start + 1
    steps = min(limits.LEAP_STEPS, len(w) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (w[steps:] / w[:-steps])[:end]
    over = np.flatnonzero(ratios >= limits.LEAP)
    if len(over) and _loss_is_worse(run, over[0]):
        return int(over[0]), float(ratios[over[0]])
    return None if rise is None else _find_lead(run.norms, w, rise)


def _find_lead(norms: np.ndarray, w: np.ndarray, rise: Rise) -> tuple[int, float] | None:
    """Finds a leap where norms and weights rise together, if the weights were ahead; or None."""
    # The norm at a step is taken before its update, the weights are recorded after it.
    large = np.flatnonzero(norms[rise.start : rise.end] >= limits.LARGE * rise.usual)
    at = rise.start + int(large[0]) if len(large) else rise.end - 1
    before = w[max(at - 2 * limits.LEAP_STEPS, 0) : at]
    before = before[is_known(before)]
    if not len(before) or before[-1] < limits.MOVED * before[0]:
        return None
    grown = np.max(w[at : rise.end], where=np.isfinite(w[at : rise.end]), initial=0) / before[0]
    return (max(rise.start, 1) - 1, float(grown)) if grown >= limits.LEAP else None


def _loss_is_worse(run: RecordedRun, at: int) -> bool:
    """Whether the loss ends higher: it falls when weights that start at zero grow."""
    if not len(run.losses):
        return False
    end = max(len(run.losses) // 4, 3)
    if run.lost_losses[-end:].any():
        return True
    before, after = (x[np.isfinite(x)] for x in (run.losses[: max(at, 3)], run.losses[-end:]))
    return len(before) > 0 < len(after) and np.median(after) > before.min() * 1.05


def _too_high(run: RecordedRun, at: int, grown: float) -> Sign:
    step = step_at(run, at)
    return Sign(
        "learning-rate-too-high",
        f"from step {step} on, gradients of the usual norm change the weights"
        f" {format_number(grown)}-fold.",
        {"growth": grown, "first": at},
        "a tenth of the learning rate, or a warm-up if it is at the start of the run. A lower bound"
        " would only hide it, and not even that with Adam, which ignores the scale of gradients.",
        step,
    )
