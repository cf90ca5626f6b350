"""A recorded run: what `metrics` returned at each step, as arrays with one entry a step."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip import validate
from optaxclip.states import kind_of


class History:
    """Collects the dict of scalars of each step, on the host, without waiting for the device.

    A step is copied to the host when the next one is appended, and has been computed by then; so
    training waits only for the copy of a few scalars.

    Args:
      window: how many of the last steps to keep; None: all.

    Raises:
      ValueError: for a window that is not a whole number of at least 1.

    >>> import optaxclip
    >>> history = optaxclip.History()
    >>> for loss in (3.0, 2.0):
    ...     history.append({"clip/grad_norm": 1.0}, loss=loss)
    >>> history.arrays()
    {'clip/grad_norm': array([1., 1.]), 'loss': array([3., 2.])}
    """

    def __init__(self, window: int | None = None):
        if window is not None and (
            isinstance(window, bool) or not isinstance(window, int) or window < 1
        ):
            raise validate.fail(
                "window must be a whole number of at least 1, or None", window, call="History"
            )
        # Converted one step late: reading a step at once would wait for the device at every step.
        self._rows: deque[dict[str, float]] = deque(maxlen=window)
        self._last: dict[str, Any] = {}

    def append(self, metrics: Mapping[str, Any], **more: Any) -> None:
        """Takes in one step: `optaxclip.metrics(opt_state)`, and `loss=` or `param_norm=`, say.

        Raises:
          ValueError: for what is not a dict of scalars, such as a state.
        """
        if not isinstance(metrics, Mapping):
            raise ValueError(
                "History.append takes the scalars of one step, not a state: write"
                f" history.append(optaxclip.metrics(opt_state), loss=loss). Got {kind_of(metrics)}."
            )
        row = {**metrics, **more}
        # Shapes are known without waiting for the numbers, so this is said at the mistaken call.
        wide = {key: np.shape(x) for key, x in row.items() if np.shape(x)}
        if wide:
            raise ValueError(
                "History.append takes one number under each key; not so"
                f" {dict(list(wide.items())[:3])}. Of several runs"
                " (vmap) append one each to a History of its own; of a lax.scan the stacked dict is"
                " a history already."
            )
        self._read()
        self._last = row

    def _read(self) -> None:
        if self._last:
            self._rows.append({key: float(x) for key, x in jax.device_get(self._last).items()})
            self._last = {}

    def __len__(self) -> int:
        self._read()
        return len(self._rows)

    def rows(self) -> list[dict[str, float]]:
        """One dict a step."""
        self._read()
        return list(self._rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """One array a key, one entry a step; NaN where a step lacks the key."""
        return to_columns(self)


Recorded = History | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def to_columns(history: Recorded) -> dict[str, np.ndarray]:
    """One array a key, on the host; NaN where a step lacks the key.

    Raises:
      ValueError: for what is no history.
    """
    rows: Any = history.rows() if isinstance(history, History) else history
    if not isinstance(rows, Mapping):
        rows = list(rows) if isinstance(rows, Iterable) else [rows]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(
                "A history must be an optaxclip.History, a dict with an array under each key, or a"
                " list with a dict for"
                " each step, as optaxclip.metrics(opt_state) returns it; got"
                f" {type(history).__name__}."
            )
        read = [jax.device_get(dict(row)) for row in rows]
        keys = dict.fromkeys(key for row in read for key in row)
        rows = {key: [float(row.get(key, np.nan)) for row in read] for key in keys}
    return {key: np.asarray(jax.device_get(x), np.float64) for key, x in rows.items()}


def select_clip(history: Recorded, clip: int = 0) -> dict[str, np.ndarray]:
    """The history of one clip: keys without their prefix, each an array with one entry a step.

    Args:
      history: a `History`; a list with a dict for each step, as `optaxclip.metrics` returns it,
        with your own entries ("loss"), if you like; or a dict of arrays. Steps that lack a key have
        NaN there.
      clip: which, if there are several clips in the state.

    Returns:
      A dict: "grad_norm", "bound", "clipped", ..., "grad_norm/<block>", ..., "loss".

    Raises:
      ValueError: for what is no history, or one without a step, or with several runs in it.

    >>> from optaxclip.monitoring.history import select_clip
    >>> select_clip([{"clip/grad_norm": 1.0, "loss": 3.0}, {"clip/grad_norm": 2.0, "loss": 1.0}])
    {'grad_norm': array([1., 2.]), 'loss': array([3., 1.])}
    """
    columns = to_columns(history)
    if not columns or any(x.ndim != 1 or not x.size for x in columns.values()):
        shapes = {key: x.shape for key, x in columns.items()}
        raise ValueError(
            f"A history has one number a step under each key, and at least one step; got {shapes}."
        )
    found = {}
    for key, column in columns.items():
        match = re.fullmatch(r"(?:clip/)?(?:(\d+)/)?(.*)", key)
        number, name = match.groups() if match else (None, key)
        if number is None or int(number) == clip:
            found[name] = column
    return found


def find_norms(seen: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
    """The norms of a clip and its blocks; if it does not measure, of a watch or skip wrapper."""
    for start in ("", "watch/", "skip/"):
        norms, blocks = seen.get(f"{start}grad_norm"), block_norms(seen, start)
        if norms is not None or blocks:
            return norms, blocks
    return None, {}


def require(seen: Mapping[str, np.ndarray], key: str, call: str) -> np.ndarray:
    """What the history of a clip has under a key that `metrics` writes.

    Raises:
      ValueError: naming the call, if it has nothing.
    """
    if key not in seen:
        raise ValueError(
            f"{call}: no {key!r} in the history of this clip, only {sorted(seen)[:20]}: append"
            " optaxclip.metrics(opt_state) at each step. If that has none, the clip does not"
            " measure: pass"
            " it measure=True, or put optaxclip.watch() before it."
        )
    return seen[key]


def block_norms(seen: Mapping[str, np.ndarray], start: str = "") -> dict[str, np.ndarray]:
    """The norms by block, if the clip was by block."""
    head = f"{start}grad_norm/"
    return {key.removeprefix(head): x for key, x in seen.items() if key.startswith(head)}


class RecordedRun(NamedTuple):
    """A recorded run, sorted by what its keys mean.

    Attributes:
      norms: (steps,), the total norm.
      blocks: for each block (steps,), its norm.
      clips: for each clip that measures its `clipped`, `grad_norm` and `bound`, each (steps,).
      losses, param_norms: (steps,); None where they are unknown.
    """

    norms: np.ndarray
    blocks: dict[str, np.ndarray]
    clips: dict[str, dict[str, np.ndarray]]
    losses: np.ndarray | None
    param_norms: np.ndarray | None


def read_run(history: Recorded, losses: Any = None, param_norms: Any = None) -> RecordedRun:
    """A run out of a `History`, of dicts of scalars, one a step, or of a dict of arrays.

    Raises:
      ValueError: if no norm is found in it.
    """
    table = to_columns(history)
    # A watch first: it sees all blocks, and in front of a clip what that clip sees.
    roots = sorted(
        (key for key in table if re.search(r"(^|/)grad_norm$", key)),
        key=lambda key: "watch" not in key,
    )
    if not roots:
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(table)[:20]}: record"
            " optaxclip.metrics(opt_state), of"
            " a chain with optaxclip.watch() or a clip that measures in it."
        )
    of_blocks = [block_norms(table, root.removesuffix("grad_norm")) for root in roots]
    # A skip wrapper has a bound and no `clipped`: it is left out, like clips that do not measure.
    heads = [key.removesuffix("bound") for key in table if re.search(r"(^|/)bound$", key)]
    fields = ("clipped", "grad_norm", "bound")
    clips = {
        head: {field: table[head + field] for field in fields}
        for head in heads
        if all(head + field in table for field in fields)
    }

    def series(given, key):
        return table.get(key) if given is None else np.asarray(jax.device_get(given), np.float64)

    blocks = next(filter(None, of_blocks), {})
    return RecordedRun(
        table[roots[0]], blocks, clips, series(losses, "loss"), series(param_norms, "param_norm")
    )
