"""A recorded run: what `metrics` returned at each step, as arrays with one entry a step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.monitoring.collect import History
from optaxclip.monitoring.summary import natural_key

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


def select_clip(history: Recorded, clip: int = 0) -> dict[str, np.ndarray]:
    """The history of one clip: keys without their prefix, each an array with one entry a step.

    Args:
      history: a `History`; a list with a dict for each step, as `optaxclip.metrics` returns it,
        with your own entries ("loss"), if you like; or a dict of arrays. Steps that lack a key have
        NaN there.
      clip: which, if there are several clips in the state; their prefix may be any. Without a clip
        it is a watch, or a skip wrapper.

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
    clips, *others = _find_heads(columns)
    # Without a clip, what a watch or a wrapper saw is the history to read.
    clips, *others = [clips, *others] if clips else [next(filter(None, others), []), [], []]
    one = clips[0] if len(clips) == 1 else dict(enumerate(clips)).get(clip)
    names = {} if one is None else {one: ""}
    names |= {heads[0]: f"{kind}/" for kind, heads in zip(_MARKS, others, strict=True) if heads}
    dropped = {*clips, *(head for heads in others for head in heads[1:])} - names.keys() - {""}
    found = {}
    for key, column in columns.items():
        head = next((head for head in names if head and key.startswith(head)), "")
        if not key.startswith(tuple(dropped)):
            found[names.get(head, "") + key.removeprefix(head)] = column
    return found


# A key that only a watch, or a wrapper, has beside its norm: prefixes are the user's.
_MARKS = {"watch": "median_ratio", "skip": "consecutive"}


def _find_heads(columns: Mapping[str, Any]) -> list[list[str]]:
    """What the keys of each clip start with, of each watch, and of each skip wrapper."""
    matches = (re.match(r"(|.*?/)(?:grad_norm|bound|clipped)(/|$)", key) for key in columns)
    heads = sorted({match[1] for match in matches if match}, key=natural_key)
    of_kind = {
        kind: [head for head in heads if head + mark in columns or head.startswith(f"{kind}/")]
        for kind, mark in _MARKS.items()
    }
    others = [head for found in of_kind.values() for head in found]
    return [[head for head in heads if head not in others], *of_kind.values()]


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
