"""A recorded run: what `metrics` returned at each step, as arrays with one entry per step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from optaxclip import validate
from optaxclip.monitoring import limits
from optaxclip.monitoring.fits import is_recorded
from optaxclip.monitoring.history import History
from optaxclip.monitoring.tables import Columns, Recorded, read_table, require_steps

_NOTHING = np.zeros(0)


class RecordedRun(NamedTuple):
    """A recorded run, sorted by what wrote its keys, under any prefix.

    Whatever the history lacks is an empty array.

    Attributes:
      table: all columns, each (steps,).
      steps: (steps,), the number of each step, counted from 1.
      source: the columns of the part whose norms are used.
      blocks: for each block (steps,), its norm.
      clip: the columns of the requested clip.
      clips, watches, skips: for each such part, its prefix -> its columns without the prefix.
    """

    table: Columns
    steps: np.ndarray
    source: Columns
    blocks: Columns
    clip: Columns
    clips: dict[str, Columns]
    watches: dict[str, Columns]
    skips: dict[str, Columns]

    @property
    def norms(self) -> np.ndarray:
        """(steps,), the norms of the whole gradient."""
        return self.source.get("grad_norm", _NOTHING)

    @property
    def losses(self) -> np.ndarray:
        """(steps,), the losses."""
        return self.table.get("loss", _NOTHING)

    @property
    def lost_losses(self) -> np.ndarray:
        """(steps,), where a loss is not finite; not where none was recorded."""
        return ~np.isfinite(self.losses) & is_recorded(self.losses)

    @property
    def param_norms(self) -> np.ndarray:
        """(steps,), the norms of all parameters."""
        return self.table.get("param_norm", _NOTHING)

    @property
    def begins_late(self) -> bool:
        """Whether the first steps of the run are missing, so that nothing shows how it began."""
        return lacks_start(self.steps)

    @property
    def losses_begin_late(self) -> bool:
        """The same for the losses, which may be logged now and then."""
        return len(self.losses) > 0 and lacks_start(self.steps[np.isfinite(self.losses)])

    def measuring_clips(self) -> dict[str, Columns]:
        """Returns the clips that measure: the others have a bound but no norm for it."""
        fields = {"grad_norm", "bound", "clipped"}
        return {head: clip for head, clip in self.clips.items() if fields <= clip.keys()}


def lacks_start(steps: np.ndarray) -> bool:
    """Whether rows before the first are missing, given the numbers of their steps.

    >>> lacks_start(np.array([100, 200, 300])), lacks_start(np.array([100, 101, 102]))
    (False, True)
    """
    # In rows, because with every hundredth step recorded the first of them may be step 100.
    return len(steps) > 1 and bool(steps[0] > limits.LATE * np.median(np.diff(steps)))


def read_run(
    history: Recorded, clip: int | None = None, *, every_row: bool = False, **columns: Any
) -> RecordedRun:
    """Reads a recorded run, and sorts its columns by what wrote them.

    Rows without a norm are left out, and so are those whose steps were taken again later, by their
    numbers under "step": after a restart from a checkpoint the later ones count.

    Args:
      history: a `History`, a dict of scalars for each step, or a dict of arrays.
      clip: the number of the clip whose norms are wanted; None: the norms before all clips.
      every_row: whether to keep rows in which no norm was recorded.
      columns: more columns, or replacements for those of the history; None adds nothing.

    Raises:
      ValueError: for anything but a history, or for one without steps, with several runs in it,
        with text, or with negative norms.

    >>> seen = read_run([{"w/grad_norm": 2.0, "w/median_ratio": 1.0, "w/grad_norm/a": 2.0}])
    >>> seen.norms, seen.blocks, seen.clips
    (array([2.]), {'a': array([2.])}, {})
    """
    more = {key: x for key, x in columns.items() if x is not None}
    table = read_table(history) | read_table(more)
    require_steps(table)
    rows = _order_rows(table)
    table = {key: x[rows] for key, x in table.items()}
    numbers = history.steps[rows] if isinstance(history, History) else 1 + np.arange(len(rows))
    run = _sort(table, numbers, clip)
    kept = _has_norm(run)
    if every_row or kept.all():
        return run
    return _sort({key: x[kept] for key, x in table.items()}, numbers[kept], clip)


def require_norms(run: RecordedRun) -> np.ndarray:
    """Returns the norms of a run.

    Raises:
      ValueError: naming the call, if the run has no norms.
    """
    if not len(run.norms):
        raise ValueError(
            f"{validate.called()}: no 'grad_norm' in the history, only"
            f" {sorted(run.table)[:20]}: append optaxclip.metrics(opt_state) at each step. If that"
            " has none, the clip does not measure: pass it measure=True, or put optaxclip.watch()"
            " before it."
        )
    return run.norms


def _has_norm(run: RecordedRun) -> np.ndarray:
    """Returns where norms were recorded; everywhere if there are none."""
    counter = run.source.get("steps", _NOTHING)
    # A counter is never NaN, so it tells more than the norms.
    known = np.isfinite(counter) if len(counter) else is_recorded(run.norms)
    return known if len(known) else np.ones(len(run.steps), bool)


def _order_rows(table: Columns) -> np.ndarray:
    """Returns the rows in the order of their steps, without those that a restart replaced."""
    everything, steps = np.arange(len(next(iter(table.values())))), table.get("step", _NOTHING)
    several = len(np.unique(table.get("run", _NOTHING))) > 1
    if several or not len(steps) or not np.isfinite(steps).all():
        return everything
    if len(np.unique(steps)) == len(steps):
        # Reports from inside a compiled step may arrive out of order.
        return np.argsort(steps)
    # Rows with the same number are no restart: they may be of training and of evaluation.
    back = np.where(np.diff(steps) < 0, steps[1:], np.inf)
    lowest_after = np.r_[np.minimum.accumulate(back[::-1])[::-1], np.inf]
    return everything[steps < lowest_after]


def _sort(table: Columns, numbers: np.ndarray, clip: int | None) -> RecordedRun:
    """Sorts the columns of a table, given the numbers of its rows."""
    parts = _find_parts(table)
    clips, watches, skips = (list(parts[kind].values()) for kind in ("clip", "watch", "skip"))
    asked = {} if clip is None or clip >= len(clips) else clips[clip]
    # Other clips come last: they may measure after another clip.
    sources = [asked, *watches, *skips, *clips] if clip is not None else [*watches, *clips, *skips]
    # `dynamic_loss_scale` skips after dividing by the scale; norms before that grow with the scale.
    sources = [*skips, *sources] if clip is None and "loss_scale" in table else sources
    source = next((x for x in sources if "grad_norm" in x), {})
    norms = source.get("grad_norm", _NOTHING)
    if (norms < 0).any():
        raise ValueError(
            f"{validate.called()}: a norm is negative, {norms.min():g}: pass the norms themselves,"
            " not their logarithms."
        )
    return RecordedRun(
        table,
        _number_steps(table, numbers, parts),
        source,
        next(filter(None, map(_block_norms, sources)), {}),
        asked,
        parts["clip"],
        parts["watch"],
        parts["skip"],
    )


def _find_parts(table: Mapping[str, np.ndarray]) -> dict[str, dict[str, Columns]]:
    """Finds the columns of each clip, watch and skip wrapper, by kind and prefix."""
    found = (re.match(r"(|.*?/)(grad_norm|bound|clipped)(/|$)", key) for key in table)
    parts: dict[str, dict[str, Columns]] = {"clip": {}, "watch": {}, "skip": {}}
    for head in dict.fromkeys(match[1] for match in found if match):
        columns = {k.removeprefix(head): x for k, x in table.items() if k.startswith(head)}
        parts[_kind_of(head, columns)][head] = columns
    return parts


def _kind_of(head: str, columns: Columns) -> str:
    """Tells what wrote the columns of a prefix, by a column that only this kind has."""
    if "median_ratio" in columns or re.search(r"(^|/)watch/", head):
        return "watch"
    return "skip" if "consecutive" in columns or re.search(r"(^|/)skip/", head) else "clip"


def _block_norms(columns: Columns) -> Columns:
    """Returns the norms by block, if a part has them."""
    head = "grad_norm/"
    return {key.removeprefix(head): x for key, x in columns.items() if key.startswith(head)}


def _number_steps(table: Columns, numbers: np.ndarray, parts: dict) -> np.ndarray:
    """Returns (steps,), the recorded number of each step, or else the given numbers."""
    # A skip wrapper's `steps` are not used: they count only the steps that it skipped.
    counters = [x.get("steps") for kind in ("watch", "clip") for x in parts[kind].values()]
    for steps in (table.get("step"), *counters):
        if steps is not None and np.isfinite(steps).all() and (np.diff(steps) > 0).all():
            return steps.astype(np.int64)
    return numbers
