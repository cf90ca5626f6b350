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
        # Through a history, which fetches many steps at once: a fetch of each number by itself
        # would wait for the device each time.
        collected = History(max_steps=max(64, len(rows)))
        for row in rows:
            collected.append(row)
        return collected.arrays()
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
    # A watch first: it sees all blocks, and in front of a clip what that clip sees.
    heads.sort(key=lambda head: kind_of_head(head, table) != "watch")
    if not heads:
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(table)[:20]}: record"
            " optaxclip.metrics(opt_state), of a chain with optaxclip.watch() or a clip that"
            " measures in it."
        )
    return RecordedRun(
        table[heads[0] + "grad_norm"],
        next(filter(None, (block_norms(table, head) for head in heads)), {}),
        # A clip that does not measure has a bound only, and is left out.
        _collect(table, ("clipped", "grad_norm", "bound")),
        _collect(table, ("consecutive", "last_reason")),
        table.get("loss") if losses is None else _to_floats(losses),
        table.get("param_norm") if param_norms is None else _to_floats(param_norms),
        table.get("loss_scale"),
        # With a bound beside it, it is that of a clip whose prefix is empty.
        table.get("grad_norm") if "bound" not in table else None,
        number_steps(history, table, heads),
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


def kind_of_head(head: str, table: Mapping[str, Any]) -> str:
    """What wrote the keys of a prefix, which may be any: each kind has one that only it has."""
    if head + "median_ratio" in table or re.search(r"(^|/)watch/", head):
        return "watch"
    return "skip" if head + "consecutive" in table or re.search(r"(^|/)skip/", head) else "clip"


def number_steps(
    history: Recorded, table: Mapping[str, np.ndarray], heads: Iterable[str]
) -> np.ndarray:
    """(steps,), the number of each step, by what counted them: a history may leave steps out."""
    # The `steps` of a skip wrapper are those that it skipped.
    counters = [head + "steps" for head in heads if kind_of_head(head, table) != "skip"]
    for steps in map(table.get, ("step", *counters)):
        if steps is not None and np.isfinite(steps).all() and (np.diff(steps) > 0).all():
            return steps.astype(np.int64)
    if isinstance(history, History):
        return history.steps
    return np.arange(1, len(next(iter(table.values()))) + 1)
