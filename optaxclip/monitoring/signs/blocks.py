"""Which block was first, and at which step of a run something is, by its number."""

from __future__ import annotations

import numpy as np

from optaxclip.monitoring.fits import is_known
from optaxclip.monitoring.history import RecordedRun
from optaxclip.monitoring.limits import AHEAD, NEIGHBOURS
from optaxclip.monitoring.summary import natural_key


def step_at(run: RecordedRun, at: int) -> int:
    """The number of a step, given its index."""
    return int(run.steps[at])


def in_block(block: str) -> str:
    """The end of a sentence that names a block, if there is one to name."""
    return f", first in {block}" if block else ""


def first_large(run: RecordedRun, at: int, end: int) -> str:
    """The block that is ahead of the others while norms rise; nothing if they rise together.

    Args:
      run: with norms by block, or none.
      at, end: the steps of the rise.
    """
    # As long before the rise as it is long: its foot is below the noise.
    foot = max(2 * at - end, 1)
    rises = {}
    for name, x in run.blocks.items():
        before, now = x[max(foot - 2 * NEIGHBOURS, 0) : foot], x[at:end]
        if is_known(before).any() and is_known(now).all():
            rises[name] = np.log(now) - np.log(np.median(before[is_known(before)]))
    if len(rises) < 2:
        return ""
    # Relative to the others: noise and rise that all blocks share say nothing.
    table = np.stack(list(rises.values()))
    leads = (table - np.median(table, axis=0)).mean(axis=1)
    return list(rises)[int(np.argmax(leads))] if leads.max() >= np.log(AHEAD) else ""


def first_lost(run: RecordedRun, at: int) -> str:
    """The block that is not finite at a step; nothing if all are: then it is not of one block.

    Of several it is the last in natural order: gradients are computed from the loss backwards.
    """
    lost = [name for name, x in run.blocks.items() if not np.isfinite(x[at])]
    return max(lost, key=natural_key) if 0 < len(lost) < len(run.blocks) else ""
