"""A recorded run: what `metrics` said at each step, as arrays with one entry a step."""

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


class History:
    """Collects the dict of scalars of each step, on the host, without waiting for the device.

    What is appended is read when the next step is, and is done by then; so training is never held up for more than what
    it costs to copy a few scalars.

    Args:
      window: how many of the last steps to keep; None: all.

    >>> import optaxclip
    >>> history = optaxclip.History()
    >>> for loss in (3.0, 2.0):
    ...     history.append({"clip/grad_norm": 1.0}, loss=loss)
    >>> history.arrays()
    {'clip/grad_norm': array([1., 1.]), 'loss': array([3., 2.])}
    """

    def __init__(self, window: int | None = None):
        self._rows: deque[dict[str, float]] = deque(maxlen=window)
        self._last: dict[str, Any] = {}

    def append(self, metrics: Mapping[str, Any], **more: Any) -> None:
        """Takes in one step: `optaxclip.metrics(opt_state)`, and for example `loss=` and `param_norm=`."""
        self._read()
        self._last = {**metrics, **more}

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
        return columns(self)


Recorded = History | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def columns(history: Recorded) -> dict[str, np.ndarray]:
    """One array a key, on the host; NaN where a step lacks the key.

    Raises:
      ValueError: for what is no history.
    """
    rows: Any = history.rows() if isinstance(history, History) else history
    if not isinstance(rows, Mapping):
        rows = list(rows) if isinstance(rows, Iterable) else [rows]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(
                "A history must be an optaxclip.History, a dict with an array under each key, or a list with a dict for"
                f" each step, as optaxclip.metrics(opt_state) returns it; got {type(history).__name__}."
            )
        read = [jax.device_get(dict(row)) for row in rows]
        keys = dict.fromkeys(key for row in read for key in row)
        rows = {key: [float(row.get(key, np.nan)) for row in read] for key in keys}
    return {key: np.asarray(jax.device_get(x), np.float64) for key, x in rows.items()}


def stacked(history: Recorded, clip: int = 0) -> dict[str, np.ndarray]:
    """The history of one clip, on the host: keys without their prefix, each an array with one entry a step.

    Args:
      history: a `History`; a list with a dict for each step, as `optaxclip.metrics` returns it, with your own entries
        ("loss"), if you like; or a dict of arrays. Steps that lack a key have NaN there.
      clip: which, if there are several clips in the state.

    Returns:
      A dict: "grad_norm", "bound", "clipped", ..., "grad_norm/<block>", ..., "loss".

    Raises:
      ValueError: for what is no history, or one without a step, or with several runs in it.

    >>> from optaxclip.history import stacked
    >>> stacked([{"clip/grad_norm": 1.0, "loss": 3.0}, {"clip/grad_norm": 2.0, "loss": 1.0}])
    {'grad_norm': array([1., 2.]), 'loss': array([3., 1.])}
    """
    arrays = columns(history)
    if not arrays or any(x.ndim != 1 or not x.size for x in arrays.values()):
        shapes = {key: x.shape for key, x in arrays.items()}
        raise ValueError(f"A history has one number a step under each key, and at least one step; got {shapes}.")
    return _of_clip(arrays, clip)


def _of_clip(arrays: dict[str, np.ndarray], clip: int) -> dict[str, np.ndarray]:
    """Without the prefix `clip/` or `clip/<number>/`, and without the other clips."""
    found = {}
    for key, value in arrays.items():
        match = re.fullmatch(r"(?:clip/)?(?:(\d+)/)?(.*)", key)
        number, name = match.groups() if match else (None, key)
        if number is None or int(number) == clip:
            found[name] = value
    return found


def needed(seen: Mapping[str, np.ndarray], key: str, call: str) -> np.ndarray:
    """What the history of a clip has under a key that `metrics` writes.

    Raises:
      ValueError: naming the call, if it has nothing.
    """
    if key not in seen:
        raise ValueError(
            f"{call}: no {key!r} in the history of this clip, only {sorted(seen)[:20]}: append"
            " optaxclip.metrics(opt_state) at each step."
        )
    return seen[key]


def blocks(seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms by block, if the clip was by block."""
    return {key.removeprefix("grad_norm/"): x for key, x in seen.items() if key.startswith("grad_norm/")}
