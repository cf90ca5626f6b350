"""Reads a recorded run, in any of its forms, as one column of numbers under each key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optaxclip import validate
from optaxclip.monitoring.fits import MISSING, guess_recorded, is_recorded
from optaxclip.monitoring.history import History
from optaxclip.states import kind_of

Recorded = History | Mapping[str, Any] | Sequence[Mapping[str, Any]]
Columns = dict[str, np.ndarray]


def is_history(x: Any) -> bool:
    """Whether this is a recorded run, and not an array of norms."""
    rows = isinstance(x, list | tuple) and len(x) > 0 and isinstance(x[0], Mapping)
    return rows or isinstance(x, Mapping | History)


def require_steps(table: Columns) -> None:
    """Raises ValueError, naming the call, unless there are steps with one number under each key."""
    call, shapes = validate.called(), {key: x.shape for key, x in table.items()}
    if not any(x.size for x in table.values()):
        raise ValueError(f"{call}: the history is empty: it must have at least one step.")
    if not any(shapes.values()):
        raise ValueError(
            f"{call}: this is one step. Pass all of them: a History, to which"
            " history.append(optaxclip.metrics(opt_state)) adds each, or a list of such dicts."
        )
    # Several lengths, or several runs: the first shape, and one that differs.
    if (
        any(len(shape) != 1 or not shape[0] for shape in shapes.values())
        or len({*shapes.values()}) > 1
    ):
        raise ValueError(
            f"{call}: a history must have at least one step, and one number per step under each"
            f" key; got shapes {shapes}."
        )


def read_table(history: Recorded) -> Columns:
    """Returns one array per key, on the host, with `MISSING` where a step lacks the key."""
    if isinstance(history, History):
        return history.arrays()
    if isinstance(history, Mapping):
        # `device_get` returns a dict sorted by key, but layers keep the order of the history.
        read = jax.device_get(dict(history))
        return {key: _to_numbers(key, read[key]) for key in history}
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
        has_text = str in set(map(type, row.values()))
        collected.append({k: _to_number(k, x) for k, x in row.items()} if has_text else row)
    return collected.arrays()


def _to_numbers(key: str, column: Any) -> np.ndarray:
    """Returns a column as numbers, also one of text, as read from a file."""
    array = np.asarray(column)
    if array.dtype.kind in "USO":
        array = np.array([_to_number(key, x) for x in array.ravel()], object).reshape(array.shape)
    array = array.astype(np.float64)
    # Gaps in what a `History` or `read_table` returned are known, and not guessed.
    if array.ndim == 1 and is_recorded(array).all():
        array[~guess_recorded(array)] = MISSING
    return array


def _to_number(key: str, x: Any) -> Any:
    """Reads text as a number, `MISSING` if it is empty; anything else stays as it is."""
    if not isinstance(x, str):
        return x
    try:
        return float(x) if x else MISSING
    except ValueError:
        raise ValueError(
            f"{validate.called()}: {key!r} is text, '{x}': a history is of numbers only, so"
            " leave this key out."
        ) from None
