"""Sentences about the arrays of a state; see `optaxclip.watching.explain`."""

from typing import Any

import jax
import numpy as np

from optaxclip.leaves import measured_leaves
from optaxclip.record import Metrics
from optaxclip.watching.bad import bad_steps, percent, short
from optaxclip.watching.state import WatchState
from optaxclip.wrappers import SkipState


def record_of(part: Any) -> Any:
    """What counts the steps of a part: of a skipping wrapper the record of its test."""
    return part.spike.metrics if isinstance(part, SkipState) else part


def _steps(count: Any, total: Any) -> str:
    return f"{int(count)} of {int(total)} steps"


def watched(w: WatchState) -> str:
    """How unusual the norm of the last step is, and where most of it is."""
    if not w.total_steps:
        return "nothing seen yet"
    names = sorted(w.blocks)
    if w.nonfinite.at_step == w.total_steps:
        first, last = names[w.nonfinite.first], names[w.nonfinite.last]
        if w.nonfinite.blocks_hit == len(names) > 1:
            return f"not finite in all of {len(names)} blocks: the loss itself is not, or the last of them, {last}"
        more = "" if first == last else f", last in {last}, where backpropagation came first"
        return f"not finite in {int(w.nonfinite.blocks_hit)} of {len(names)} blocks, first in {first}{more}"
    usual = "" if w.trackers.median.blocks.seen < 2 else f" = {short(w.median_ratio)} x the median"
    most = (
        f"; {percent(w.top_shares[0])} of it in {names[w.top_blocks[0]]}" if len(names) > 1 and w.total_norm > 0 else ""
    )
    return f"norm {short(w.total_norm)}{usual}{most}"


def history(w: WatchState) -> list[str]:
    """What a watch knows of the steps before: one line each."""
    lines = [f"bad: {bad}" for bad in bad_steps(w)]
    if w.trackers.median.blocks.seen < 10:
        return lines
    if w.quantile_names:
        pairs = zip(sorted(w.quantile_names, key=float), quantiles_in_order(w), strict=True)
        lines.append("norms lately: " + ", ".join(f"{percent(float(q))} below {short(x)}" for q, x in pairs))
    if w.candidates:
        rates = zip(sorted(w.candidates), w.would_clip / w.total_steps, strict=True)
        tried = ", ".join(f"{percent(rate)} at {name}" for name, rate in rates)
        lines.append(f"would have clipped of {int(w.total_steps)} steps: {tried}")
    return lines


def quantiles_in_order(w: WatchState) -> list[float]:
    """The quantiles, the lowest level first."""
    by_name = dict(zip(sorted(w.quantile_names), w.quantiles.tolist(), strict=True))
    return [by_name[name] for name in sorted(by_name, key=float)]


def norm_of(m: Metrics) -> str:
    """What a clip alone knows of the norm."""
    norm = np.max(m.grad_norm, initial=0)
    if not np.isfinite(norm):
        hit = [name for name, x in zip(sorted(m.blocks), np.ravel(m.grad_norm), strict=False) if not np.isfinite(x)]
        return "the norm is not finite" + (
            f" in {len(hit)} of {len(m.blocks)} blocks, first in {hit[0]}" if hit else ""
        )
    largest = int(np.argmax(m.grad_norm)) if m.blocks else 0
    return f"norm {short(norm)}" + (
        f" in {sorted(m.blocks)[largest]}, the longest of {len(m.blocks)}" if m.blocks else ""
    )


def clipped(m: Metrics) -> str:
    """What a clip did, and how often."""
    often = _steps(np.max(m.clipped_steps, initial=0), m.total_steps)
    bad = int(np.max(m.nonfinite_steps, initial=0))
    return f"{_deed(m)} ({often}{f', {bad} not finite' if bad else ''})"


def _deed(m: Metrics) -> str:
    if m.blocks:
        over = np.flatnonzero(m.clipped_share)
        if not len(over):
            return "nothing clipped"
        most = over[np.argmin(m.clip_factor[over])]
        to = short(m.grad_norm[most] * m.clip_factor[most])
        return f"{len(over)} of {len(m.blocks)} blocks clipped, most {sorted(m.blocks)[most]}, to {to}"
    if not np.all(np.isfinite(m.grad_norm)):
        return "made zero" if np.all(m.clip_factor == 0) else "all of it is NaN now"
    share, after = float(np.max(m.clipped_share, initial=0)), float(np.max(m.grad_norm * m.clip_factor, initial=0))
    if 0 < share < 1:
        return f"{percent(share)} of units or elements clipped, at {short(m.clip_bound)} at least"
    if share:
        return f"clipped to {short(after)}"
    if np.all(m.clip_factor == 1):
        return f"not clipped: {'no bound' if np.isinf(m.clip_bound) else f'within {short(m.clip_bound)}'}"
    return f"scaled to {short(after)}"


def skipped(s: SkipState) -> str:
    """Whether a wrapper skipped the step, why, and how often."""
    m = s.spike.metrics
    often = f"{_steps(s.skipped_steps, m.total_steps)} skipped"
    if not s.consecutive_skips:
        return f"step taken ({often})"
    why = (
        "" if not np.isfinite(m.grad_norm) else f", over {short(m.clip_bound)}" if m.clipped_share else " for its loss"
    )
    return f"step skipped{why} ({often}, {int(s.consecutive_skips)} without a break)"


def of_params(params: Any) -> list[str]:
    """A line on the parameters, if there are any."""
    leaves = measured_leaves(params)
    if not leaves.arrays:
        return []
    norms = [float(np.linalg.norm(np.ravel(np.asarray(jax.device_get(x), np.complex128)))) for x in leaves.arrays]
    lost = [path for path, norm in zip(leaves.paths, norms, strict=True) if not np.isfinite(norm)]
    if lost:
        return [
            f"parameters: not finite in {len(lost)} of {len(norms)} leaves, first in {lost[0]}: go back to a checkpoint"
        ]
    return [f"parameters: norm {short(float(np.linalg.norm(norms)))}"]
