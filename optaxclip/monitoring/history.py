"""A recorded run: what `metrics` returned at each step, as arrays with one entry a step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.monitoring.collect import History

Recorded = History | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def to_columns(history: Recorded) -> dict[str, np.ndarray]:
    """One array a key, on the host; NaN where a step lacks the key.

    Raises:
      ValueError: for what is no history.
    """
    if isinstance(history, History):
        return history.arrays()
    rows: Any = history
    if not isinstance(rows, Mapping):
        rows = list(rows) if isinstance(rows, Iterable) else [rows]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(
                "A history must be an optaxclip.History, a dict with an array under each key, or a"
                " list with a dict for each step, as optaxclip.metrics(opt_state) returns it; got"
                f" {type(history).__name__}."
            )
        # All at once: each fetch of its own waits for the device.
        read = jax.device_get(list(map(dict, rows)))
        keys = dict.fromkeys(key for row in read for key in row)
        rows = {key: [float(row.get(key, np.nan)) for row in read] for key in keys}
    return {key: np.asarray(jax.device_get(x), np.float64) for key, x in rows.items()}


def block_norms(seen: Mapping[str, np.ndarray], start: str = "") -> dict[str, np.ndarray]:
    """The norms by block, if the clip was by block."""
    head = f"{start}grad_norm/"
    return {key.removeprefix(head): x for key, x in seen.items() if key.startswith(head)}


class RecordedRun(NamedTuple):
    """A recorded run, sorted by what its keys mean, under whatever prefix.

    Attributes:
      norms: (steps,), the total norm.
      blocks: for each block (steps,), its norm.
      clips: for each clip that measures its `clipped`, `grad_norm` and `bound`, each (steps,).
      skips: for each skip wrapper its `consecutive` and `last_reason`, each (steps,).
      losses, param_norms, loss_scales: (steps,); None where they are unknown.
      own: the norm that the user recorded himself, without a prefix; None without one.
      steps: (steps,), the number of each step, counted from 1.
    """

    norms: np.ndarray
    blocks: dict[str, np.ndarray]
    clips: dict[str, dict[str, np.ndarray]]
    skips: dict[str, dict[str, np.ndarray]]
    losses: np.ndarray | None
    param_norms: np.ndarray | None
    loss_scales: np.ndarray | None
    own: np.ndarray | None
    steps: np.ndarray


def read_run(history: Recorded, losses: Any = None, param_norms: Any = None) -> RecordedRun:
    """A run out of a `History`, of dicts of scalars, one a step, or of a dict of arrays.

    Raises:
      ValueError: if no norm is found in it.
    """
    table = to_columns(history)
    heads = [key.removesuffix("grad_norm") for key in table if re.search(r"(^|/)grad_norm$", key)]
    # A watch first: it sees all blocks, and in front of a clip what that clip sees. It is known by
    # a key that only it has, as prefixes are the user's.
    heads.sort(key=lambda head: head + "median_ratio" not in table and "watch" not in head)
    if not heads:
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(table)[:20]}: record"
            " optaxclip.metrics(opt_state), of a chain with optaxclip.watch() or a clip that"
            " measures in it."
        )
    norms = table[heads[0] + "grad_norm"]

    return RecordedRun(
        norms,
        next(filter(None, (block_norms(table, head) for head in heads)), {}),
        # A clip that does not measure has a bound only, and is left out.
        _collect(table, ("clipped", "grad_norm", "bound")),
        _collect(table, ("consecutive", "last_reason")),
        table.get("loss") if losses is None else _to_floats(losses),
        table.get("param_norm") if param_norms is None else _to_floats(param_norms),
        table.get("loss_scale"),
        # With a bound beside it, it is that of a clip whose prefix is empty.
        table.get("grad_norm") if "bound" not in table else None,
        _number_steps(history, table, heads, len(norms)),
    )


def _to_floats(x: Any) -> np.ndarray:
    return np.asarray(jax.device_get(x), np.float64)


def _collect(table: dict[str, np.ndarray], fields: tuple[str, ...]) -> dict[str, dict]:
    """For each prefix under which all these fields are, their arrays."""
    ends = [key.removesuffix(fields[0]) for key in table if re.search(rf"(^|/){fields[0]}$", key)]
    return {
        head: {field: table[head + field] for field in fields}
        for head in ends
        if all(head + field in table for field in fields)
    }


def _number_steps(history: Recorded, table: dict, heads: list[str], count: int) -> np.ndarray:
    """The number of each step, of what counted them: entries may be left out of a history."""
    # The `steps` of a skip wrapper are those that it skipped.
    keys = [head + "steps" for head in heads if head + "last_reason" not in table]
    for steps in (table.get("step"), *map(table.get, keys)):
        if steps is not None and np.isfinite(steps).all() and (np.diff(steps) > 0).all():
            return steps.astype(np.int64)
    return history.steps if isinstance(history, History) else np.arange(1, count + 1)
