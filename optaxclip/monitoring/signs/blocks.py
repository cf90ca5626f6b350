"""Which block was first, and at which step of a run something is, by its number."""

from __future__ import annotations

import numpy as np

from optaxclip.monitoring.fits import is_known
from optaxclip.monitoring.history import RecordedRun
from optaxclip.monitoring.limits import NEIGHBOURS
from optaxclip.monitoring.summary import natural_key


def step_at(run: RecordedRun, at: int) -> int:
    """The number of a step, given its index."""
    return int(run.steps[at])


def in_block(block: str) -> str:
    """The end of a sentence that names a block, if there is one to name."""
    return f", first in {block}" if block else ""


def first_large(run: RecordedRun, at: int, end: int, ratio: float) -> str:
    """The block that first was so many times its usual norm, of those the one that is most.

    Args:
      run: with norms by block, or none.
      at, end: between which steps to look.
      ratio: of a norm over its median before.
    """
    found = []
    for name, x in run.blocks.items():
        before = x[max(at - 2 * NEIGHBOURS, 0) : max(at, 1)]
        known = before[is_known(before)]
        ratios = x[at:end] / np.median(known) if len(known) else np.zeros(end - at)
        over = np.flatnonzero(ratios >= ratio)
        if len(over):
            found.append((over[0], -ratios[over[0]], name))
    return min(found)[2] if len(run.blocks) > 1 and found else ""


def first_lost(run: RecordedRun, at: int) -> str:
    """The block that is not finite at a step; nothing if all are: then it is not of one block.

    Of several it is the last in natural order: gradients are computed from the loss backwards.
    """
    lost = [name for name, x in run.blocks.items() if not np.isfinite(x[at])]
    return max(lost, key=natural_key) if 0 < len(lost) < len(run.blocks) else ""
