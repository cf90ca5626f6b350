"""What was seen at each of many steps, collected on the host: the window that `diagnose` judges."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
        return columns(self.rows())


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """One array a key out of one dict a step."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: np.array([float(row.get(key, np.nan)) for row in rows]) for key in keys}


class Window(NamedTuple):
    """A recorded window, sorted by what it says.

    Attributes:
      norms: (steps,), the total norm.
      blocks: for each block (steps,), its norm.
      clips: for each clip its `clipped`, `grad_norm` and `bound`, each (steps,).
      losses, param_norms: (steps,); None where they are unknown.
    """

    norms: np.ndarray
    blocks: dict[str, np.ndarray]
    clips: dict[str, dict[str, np.ndarray]]
    losses: np.ndarray | None
    param_norms: np.ndarray | None


def as_window(history: Any, losses: Any = None, param_norms: Any = None) -> Window:
    """A window out of a `History`, of dicts of scalars, one a step, or of a dict of arrays.

    Raises:
      ValueError: if no norm is found in it.
    """
    table = history.arrays() if isinstance(history, History) else history
    table = table if isinstance(table, Mapping) else columns([jax.device_get(row) for row in table])
    table = {key: np.asarray(jax.device_get(x), np.float64) for key, x in table.items()}
    roots = sorted((key for key in table if re.search(r"(^|/)grad_norm$", key)), key=lambda key: "watch" not in key)
    if not roots:
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(table)[:20]}: record optaxclip.metrics(opt_state), of"
            " a chain with optaxclip.watch() or a clip in it."
        )
    of_blocks = [{key[len(root) + 1 :]: table[key] for key in table if key.startswith(root + "/")} for root in roots]
    heads = [key[: -len("bound")] for key in table if re.search(r"(^|/)bound$", key)]
    clips = {head: {field: table[head + field] for field in ("clipped", "grad_norm", "bound")} for head in heads}
    return Window(
        table[roots[0]],
        next(filter(None, of_blocks), {}),
        clips,
        _series(losses, table, "loss"),
        _series(param_norms, table, "param_norm"),
    )


def _series(given: Any, table: Mapping[str, np.ndarray], key: str) -> np.ndarray | None:
    return table.get(key) if given is None else np.asarray(jax.device_get(given), np.float64)
