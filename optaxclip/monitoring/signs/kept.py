"""A state that is thrown away: each update starts where the one before it started."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.history import Columns, RecordedRun
from optaxclip.monitoring.limits import ENOUGH


def forgetting(run: RecordedRun) -> Iterator[Sign]:
    """Counters of steps that stand still: the state that an update returns is not kept."""
    counters = _count_steps(run.watches | run.clips)
    # In a run that is skipped as a whole a wrapper still counts what it skips.
    moving = any(np.ptp(x) > 0 for x in (_count_steps(run.skips) | counters).values())
    steps = max(map(len, counters.values()), default=0)
    if steps < ENOUGH or moving or _is_explained(run, counters):
        return
    name, count = next((name, int(x[0])) for name, x in counters.items())
    yield Sign(
        "state-not-kept",
        f"{name} is {count} at each of {steps} steps: the recorded state never advances, so nothing"
        " is learned from one step to the next, and what else is recorded is of no use.",
        {"steps": steps, "count": count},
        "keep what update returns, updates, state = tx.update(grads, state, params), out of the"
        " compiled step, too, and record optaxclip.metrics(state) of it. (optax.MultiSteps and"
        " apply_if_finite hold back the state inside: there record more steps.)",
    )


def _count_steps(parts: dict[str, Columns]) -> dict[str, np.ndarray]:
    """The counter of each part that has one, where it is known."""
    counters = {f"{head}steps": part["steps"] for head, part in parts.items() if "steps" in part}
    return {name: x[np.isfinite(x)] for name, x in counters.items() if np.isfinite(x).any()}


def _is_explained(run: RecordedRun, counters: dict[str, np.ndarray]) -> bool:
    """Whether counters may stand still though the state is kept."""
    # Rows of several runs side by side are at the same step.
    together = len(np.unique(run.table.get("run", np.zeros(1)))) > 1
    # Within one accumulation the norms stand still, too; where a state is dropped they vary.
    paused = any(x[0] > 0 for x in counters.values()) and len(np.unique(run.norms)) == 1
    # Steps that `optax.apply_if_finite` rejects leave no trace but their losses.
    rejected = len(run.losses) > 0 and not np.isfinite(run.losses).any()
    return together or paused or rejected
