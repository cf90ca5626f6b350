"""Finds norms that stand out from those around them: alone, in a burst, or all over the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_number
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.fits import is_known, large_ratio, over_neighbours, tail_index
from optaxclip.monitoring.recorded import RecordedRun
from optaxclip.monitoring.signs.blocks import first_large, in_block, step_at


def spiking(run: RecordedRun) -> Iterator[Sign]:
    """Finds single spikes, a burst, or a heavy tail, which has spikes everywhere."""
    where = np.flatnonzero(is_known(run.norms))
    if len(where) < limits.ENOUGH:
        return
    ratios = over_neighbours(run.norms[where])
    if len(where) >= limits.ENOUGH_FOR_TAILS and _is_heavy(ratios):
        yield _heavy_tail(ratios)
        return
    large = np.flatnonzero(ratios >= large_ratio(ratios, len(ratios)))
    # The first steps are large in many runs, and nothing was usual before them.
    large = large[large >= 5]
    if not len(large):
        return
    events = np.split(large, np.flatnonzero(np.diff(large) > limits.EVENT_STEPS) + 1)
    # A burst matters more than single spikes in the same run, however large these are.
    event = max(events, key=len)
    if len(event) >= limits.BURST:
        yield _burst(run, where, ratios, event)
    else:
        yield _spike(run, where, ratios, events)


def _is_heavy(ratios: np.ndarray) -> bool:
    """Whether the tail is heavy in the whole run, and nearly everywhere in it."""
    # A spike or a burst makes the tail of one quarter heavy, and with it that of the whole run.
    everywhere = [quarter.max() >= limits.TAIL_RATIO for quarter in np.array_split(ratios, 4)]
    index, high = tail_index(ratios), float(np.quantile(ratios, 0.99))
    heavy = index < limits.TAIL_INDEX and high >= limits.TAIL_RATIO
    return heavy and sum(everywhere) >= 3


def _heavy_tail(ratios: np.ndarray) -> Sign:
    index, high = tail_index(ratios), float(np.quantile(ratios, 0.99))
    return Sign(
        "heavy-tail",
        f"1 % of the norms are over {format_number(high)} times the median around them, the largest"
        f" {format_number(ratios.max())} times; with a tail index of {format_number(index)} their"
        " variance is infinite.",
        {"tail_index": index, "quantile_99": high, "largest": float(ratios.max())},
        "a clip, because without one a few steps decide where the run goes: quantile_clip(0.9), or"
        " zclip with a cap (max_norm=); or a larger batch.",
    )


def _burst(run: RecordedRun, where: np.ndarray, ratios: np.ndarray, event: np.ndarray) -> Sign:
    first, last = int(where[event[0]]), int(where[event[-1]])
    largest = float(ratios[event].max())
    block = first_large(run, first, first + 1)
    return Sign(
        "spike-burst",
        f"{len(event)} spikes from step {step_at(run, first)} to {step_at(run, last)}, up to"
        f" {format_number(largest)} times the usual norm{in_block(block)}.",
        {"spikes": len(event), "largest": largest, "first": first, "last": last},
        "optaxclip.skip_spikes(optimizer), and a lower learning rate or a higher ε of Adam: a"
        " cluster of spikes means that the run is at the edge of stability there.",
        step_at(run, first),
        block,
    )


def _spike(run: RecordedRun, where, ratios: np.ndarray, events: list[np.ndarray]) -> Sign:
    peaks = [event[np.argmax(ratios[event])] for event in events]
    peak = max(peaks, key=lambda i: ratios[i])
    at, first, largest = int(where[peak]), int(where[peaks[0]]), float(ratios[peak])
    block = first_large(run, at, at + 1)
    more = f", the largest of {len(events)} such spikes" if len(events) > 1 else ""
    # The last event of a record may still be the start of an explosion.
    open_end = peak in events[-1] and events[-1][-1] == len(ratios) - 1
    after = "the record ends there" if open_end else "afterwards it is as before"
    return Sign(
        "spike",
        f"the norm is {format_number(largest)} times the usual one at step {step_at(run, at)}"
        f"{in_block(block)}{more}; {after}.",
        {"spikes": len(events), "largest": largest, "at": at, "first": first},
        "look at the batch of this step (watch keeps its tag=); optaxclip.skip_spikes(optimizer)"
        " leaves such steps out.",
        step_at(run, at),
        block,
    )
