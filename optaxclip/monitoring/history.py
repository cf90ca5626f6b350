"""A recorded run: what `metrics` returned at each step, as arrays with one entry per step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip import validate
from optaxclip.monitoring.collect import History
from optaxclip.monitoring.limits import LATE
from optaxclip.states import kind_of

Recorded = History | Mapping[str, Any] | Sequence[Mapping[str, Any]]
Columns = dict[str, np.ndarray]

_NOTHING = np.zeros(0)


class RecordedRun(NamedTuple):
    """A recorded run, sorted by what wrote its keys, under any prefix.

    Whatever the history lacks is an empty array.

    Attributes:
      table: all columns, each (steps,).
      steps: (steps,), the number of each step, counted from 1.
      norms: (steps,), the norm of the whole gradient.
      blocks: for each block (steps,), its norm.
      clip: the columns of the requested clip.
      clips, watches, skips: for each such part, its prefix -> its columns without the prefix.
    """

    table: Columns
    steps: np.ndarray
    norms: np.ndarray
    blocks: Columns
    clip: Columns
    clips: dict[str, Columns]
    watches: dict[str, Columns]
    skips: dict[str, Columns]

    @property
    def losses(self) -> np.ndarray:
        """(steps,), the losses."""
        return self.table.get("loss", _NOTHING)

    @property
    def param_norms(self) -> np.ndarray:
        """(steps,), the norms of all parameters."""
        return self.table.get("param_norm", _NOTHING)

    @property
    def begins_late(self) -> bool:
        """Whether the first steps of the run are missing, so that nothing shows how it began."""
        if len(self.steps) < 2:
            return False
        # With every hundredth step recorded, the first of them may be step 100.
        allowed = max(2 * np.median(np.diff(self.steps)), LATE * np.ptp(self.steps))
        return bool(self.steps[0] > allowed)

    def measuring_clips(self) -> dict[str, Columns]:
        """Returns the clips that measure: the others have a bound but no norm for it."""
        fields = {"grad_norm", "bound", "clipped"}
        return {head: clip for head, clip in self.clips.items() if fields <= clip.keys()}


def read_run(history: Recorded, clip: int | None = None, **columns: Any) -> RecordedRun:
    """Reads a recorded run, and sorts its columns by what wrote them.

    Args:
      history: a `History`, a dict of scalars for each step, or a dict of arrays.
      clip: the number of the clip whose norms are wanted; None: the norms before all clips.
      columns: more columns, or replacements for those of the history; None adds nothing.

    Raises:
      ValueError: for anything but a history, or for one without steps or with several runs in it.

    >>> seen = read_run([{"w/grad_norm": 2.0, "w/median_ratio": 1.0, "w/grad_norm/a": 2.0}])
    >>> seen.norms, seen.blocks, seen.clips
    (array([2.]), {'a': array([2.])}, {})
    """
    more = {key: x for key, x in columns.items() if x is not None}
    table = _read_table(history) | _read_table(more)
    _require_steps(table)
    parts = _find_parts(table)
    clips, watches, skips = (list(parts[kind].values()) for kind in ("clip", "watch", "skip"))
    asked = {} if clip is None or clip >= len(clips) else clips[clip]
    # Other clips come last: they may measure after another clip.
    sources = [asked, *watches, *skips, *clips] if clip is not None else [*watches, *clips, *skips]
    # `dynamic_loss_scale` skips after dividing by the scale; norms before that grow with the scale.
    sources = [*skips, *sources] if clip is None and "loss_scale" in table else sources
    return RecordedRun(
        table,
        _number_steps(history, table, parts),
        next((x["grad_norm"] for x in sources if "grad_norm" in x), _NOTHING),
        next(filter(None, map(_block_norms, sources)), {}),
        asked,
        parts["clip"],
        parts["watch"],
        parts["skip"],
    )


def _require_steps(table: Columns) -> None:
    """Raises ValueError, naming the call, unless there are steps with one number under each key."""
    call, shapes = validate.called(), {key: x.shape for key, x in table.items()}
    if not any(x.size for x in table.values()):
        raise ValueError(f"{call}: the history is empty: it must have at least one step.")
    if not any(shapes.values()):
        raise ValueError(
            f"{call}: this is one step. Pass all of them: a History, to which"
            " history.append(optaxclip.metrics(opt_state)) adds each, or a list of such dicts."
        )
    if any(len(shape) != 1 or not shape[0] for shape in shapes.values()):
        raise ValueError(
            f"{call}: a history must have at least one step, and one number per step under each"
            f" key; got shapes {shapes}."
        )


def _read_table(history: Recorded) -> Columns:
    """Returns one array per key, on the host, with NaN where a step lacks the key."""
    if isinstance(history, History):
        return history.arrays()
    if isinstance(history, Mapping):
        # `device_get` returns a dict sorted by key, but layers keep the order of the history.
        read = jax.device_get(dict(history))
        return {key: np.asarray(read[key], np.float64) for key in history}
    rows = list(history) if isinstance(history, Iterable) else [history]
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"{validate.called()}: a history must be an optaxclip.History, a dict with an array"
            " under each key, or a list with a dict for each step, as optaxclip.metrics(opt_state)"
            f" returns it; got {kind_of(history)}."
        )
    # Not one `device_get` of everything: it takes 30 us per scalar, and a run has 100,000 of them.
    collected = History(window=max(len(rows), 1))
    for row in rows:
        collected.append(row)
    return collected.arrays()


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


def _number_steps(history: Recorded, table: Columns, parts: dict) -> np.ndarray:
    """Returns (steps,), the recorded number of each step, since a history may leave steps out."""
    # A skip wrapper's `steps` are not used: they count only the steps that it skipped.
    counters = [x.get("steps") for kind in ("watch", "clip") for x in parts[kind].values()]
    for steps in (table.get("step"), *counters):
        if steps is not None and np.isfinite(steps).all() and (np.diff(steps) > 0).all():
            return steps.astype(np.int64)
    if isinstance(history, History):
        return history.steps
    return np.arange(1, len(next(iter(table.values()))) + 1)
