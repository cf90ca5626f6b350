"""Finds the block that was first, and the number of a step in a run."""

from __future__ import annotations

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.fits import is_known
from optaxclip.monitoring.recorded import RecordedRun
from optaxclip.monitoring.summary import natural_key


def step_at(run: RecordedRun, at: int) -> int:
    """Returns the number of a step, given its index."""
    return int(run.steps[at])


def in_block(block: str) -> str:
    """Returns the end of a sentence that names a block, if there is one."""
    return f", first in {block}" if block else ""


def first_large(run: RecordedRun, at: int, end: int) -> str:
    """Finds the block that is ahead while norms rise; "" if all blocks rise together.

    Args:
      run: a recorded run, with or without norms by block.
      at, end: the steps of the rise.
    """
    # Starts one length of the rise earlier, because the noise hides where a rise begins.
    foot = max(2 * at - end, 1)
    rises = {}
    for name, x in run.blocks.items():
        before, now = x[max(foot - 2 * limits.NEIGHBOURS, 0) : foot], x[at:end]
        if is_known(before).any() and is_known(now).all():
            rises[name] = np.log(now) - np.log(np.median(before[is_known(before)]))
    if len(rises) < 2:
        return ""
    # Relative to the other blocks: noise and growth that all of them share tell nothing.
    table = np.stack(list(rises.values()))
    leads = (table - np.median(table, axis=0)).mean(axis=1)
    return list(rises)[int(np.argmax(leads))] if leads.max() >= np.log(limits.AHEAD) else ""


def first_lost(run: RecordedRun, at: int) -> str:
    """Finds the block that is not finite at a step; "" if all are, so that none is to blame.

    If there are several, it is the last in natural order: gradients are computed from the loss
    backwards.
    """
    lost = [name for name, x in run.blocks.items() if not np.isfinite(x[at])]
    return max(lost, key=natural_key) if 0 < len(lost) < len(run.blocks) else ""
