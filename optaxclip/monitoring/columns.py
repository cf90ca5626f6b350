"""A recorded run by its parts: clips, watches and skip wrappers, under whatever prefix."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.history import (
    Recorded,
    block_norms,
    kind_of_head,
    number_steps,
    to_columns,
)

Columns = dict[str, np.ndarray]


class Recording(NamedTuple):
    """A recorded run.

    Attributes:
      table: all columns, each (steps,).
      steps: (steps,), the number of each step, counted from 1.
      clips, watches, skips: for each such part its columns, without their prefix, in order.
    """

    table: Columns
    steps: np.ndarray
    clips: list[Columns]
    watches: list[Columns]
    skips: list[Columns]

    def norms(self, clip: int = 0) -> np.ndarray | None:
        """The norm of the whole gradient: of a clip; if it does not measure, of a watch."""
        return next((x["grad_norm"] for x in self._sources(clip) if "grad_norm" in x), None)

    def blocks(self, clip: int = 0) -> Columns:
        """The norms of the blocks; of a clip without any, those of a watch."""
        return next(filter(None, map(block_norms, self._sources(clip))), {})

    def clip(self, clip: int = 0) -> Columns:
        """The columns of a clip; {} if there is none."""
        return self.clips[clip] if clip < len(self.clips) else {}

    def _sources(self, clip: int) -> list[Columns]:
        # Other clips last: what they measure is behind the first.
        return [self.clip(clip), *self.watches, *self.skips, *self.clips]


def read_columns(history: Recorded) -> Recording:
    """A `History`, a dict of scalars for each step, or a dict of arrays, sorted by what wrote it.

    Raises:
      ValueError: for what is no history, or one without a step, or with several runs in it.

    >>> from optaxclip.monitoring.columns import read_columns
    >>> seen = read_columns([{"w/grad_norm": 2.0, "w/median_ratio": 1.0, "w/grad_norm/a": 2.0}])
    >>> seen.norms(), seen.blocks(), seen.clips
    (array([2.]), {'a': array([2.])}, [])
    """
    table = to_columns(history)
    if not table or any(x.ndim != 1 or not x.size for x in table.values()):
        shapes = {key: x.shape for key, x in table.items()}
        raise ValueError(
            f"A history has one number a step under each key, and at least one step; got {shapes}."
        )
    found = (re.match(r"(|.*?/)(grad_norm|bound|clipped)(/|$)", key) for key in table)
    heads = dict.fromkeys(match[1] for match in found if match)
    kinds: dict[str, list[Columns]] = {"clip": [], "watch": [], "skip": []}
    for head in heads:
        kinds[kind_of_head(head, table)].append(
            {key.removeprefix(head): x for key, x in table.items() if key.startswith(head)}
        )
    return Recording(table, number_steps(history, table, heads), *kinds.values())
