"""The last bad steps, for a post-mortem."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.monitoring.findings import format_number, format_share
from optaxclip.monitoring.reading import check_is_state, find_parts
from optaxclip.monitoring.state import WatchState
from optaxclip.record import unpack_names


class BadStep(NamedTuple):
    """A step to look at after the run.

    Attributes:
      step: counted from 1.
      norm: the total norm.
      median_ratio: that norm over the median of the steps before.
      block: the first block that was not finite, or the one with the largest share.
      share: that block's share of the squared norm; if not finite, one over the number of such
        blocks.
      tag: what `update` was called with as `tag=`; None for nothing.
    """

    step: int
    norm: float
    median_ratio: float
    block: str
    share: float
    tag: int | None

    def __str__(self) -> str:
        tag = "" if self.tag is None else f" (tag {self.tag})"
        if not np.isfinite(self.norm):
            return f"step {self.step}{tag}: not finite{self.block and f', first in {self.block}'}"
        how = f"norm {format_number(self.norm)} = {format_number(self.median_ratio)} x the median"
        where = f"; {format_share(self.share)} of it in {self.block}" if self.block else ""
        return f"step {self.step}{tag}: {how}{where}"


def bad_steps(opt_state: Any) -> tuple[BadStep, ...]:
    """The last bad steps that the watches in an optimizer's state have kept, oldest first.

    Args:
      opt_state: the state of an optimizer, or any tree that holds one; on the host, between steps.

    Raises:
      ValueError: for the states of several runs at once (`vmap`), and for what cannot be a state.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.watch()
    >>> state = tx.init({"w": jnp.ones(1)})
    >>> for batch, gradient in enumerate((1.0, jnp.nan, 1.0)):
    ...     _, state = tx.update({"w": jnp.array([gradient])}, state, tag=batch)
    >>> print(*optaxclip.bad_steps(state))
    step 2 (tag 1): not finite, first in w
    """
    check_is_state(opt_state, "bad_steps")
    found = [
        bad
        for part in find_parts(opt_state)
        if isinstance(part, WatchState)
        for bad in read_ring(part)
    ]
    return tuple(sorted(found, key=lambda bad: bad.step))


def read_ring(w: WatchState) -> list[BadStep]:
    """The bad steps of one watch, oldest first."""
    check_one_run(w.total_steps)
    # Of a tree without blocks the culprit is -1: the last name, which is empty.
    ring, names = jax.device_get(w.bad), (*unpack_names(w.blocks), "")
    rows = sorted(zip(*(x.tolist() for x in ring[1:]), strict=True))
    return [
        BadStep(step, norm, ratio, names[block], share, None if tag < 0 else tag)
        for step, norm, ratio, block, share, tag in rows
        if step >= 0
    ]


def check_one_run(steps: Any) -> None:
    """Raises if a state is that of several runs."""
    if np.ndim(steps):
        raise ValueError(
            f"This is the state of several runs, {np.shape(steps)}: pick one, jax.tree.map(lambda"
            " x: x[0], opt_state)."
        )
