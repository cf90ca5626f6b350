"""The last bad steps for a post-mortem: episodes, and which block broke first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.monitoring.display import format_number, format_share
from optaxclip.monitoring.findings import Findings
from optaxclip.monitoring.reading import check_is_state, find_parts
from optaxclip.monitoring.state import WatchState, read_numbers
from optaxclip.monitoring.summary import AFTER, KEPT
from optaxclip.trees import unpack_names

_BROKEN = 5.0  # a block counts as broken above this many times its norm before the episode


class BadStep(NamedTuple):
    """A step to look at after the run.

    Attributes:
      step: counted from 1.
      norm: the total norm.
      median_ratio: that norm divided by the median of the steps before.
      block: the first block that was not finite, or the one with the largest share.
      share: that block's share of the squared norm; at a step that is not finite, one over the
        number of blocks that are not.
      tag: the `tag=` that `update` was called with; None if there was none.
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


class Episode(NamedTuple):
    """A group of bad steps that are at most eight steps apart.

    Attributes:
      first: the first bad step, which is where to look for the cause.
      worst: the first that was not finite, or else the one furthest above the median.
      last: the last bad step.
      bad_steps: how many there were.
      norms: the norms of all blocks, step -> block -> norm, for the last episode only: from a few
        steps before it began to the first step that was not finite, and at most four steps after it
        began. {} for earlier episodes.
    """

    first: BadStep
    worst: BadStep
    last: BadStep
    bad_steps: int
    norms: Mapping[int, Mapping[str, float]]

    def order(self) -> dict[str, int]:
        """Returns the blocks that broke, in order, each with the step at which it broke.

        A block breaks when it is not finite, or above five times its norm before the episode.
        Blocks that broke at the same step are sorted by that ratio, largest first.
        """
        # The median of the block, not of the whole tree: layers differ by orders of magnitude.
        before = [row for step, row in self.norms.items() if step < self.first.step]
        broke: dict[str, tuple[int, float]] = {}
        for step, row in self.norms.items():
            for block, norm in row.items():
                usual = np.median([r[block] for r in before]) if before else np.inf
                ratio = norm / usual if usual > 0 and np.isfinite(norm) else np.inf
                if block not in broke and not (np.isfinite(norm) and norm <= _BROKEN * usual):
                    broke[block] = step, -ratio
        return {block: broke[block][0] for block in sorted(broke, key=broke.__getitem__)}

    def __str__(self) -> str:
        if self.bad_steps == 1:
            return str(self.first)
        steps = f"steps {self.first.step} to {self.last.step}, {self.bad_steps} bad"
        worst = "" if self.worst.step == self.first.step else f"; worst: {self.worst}"
        return f"{steps}; first: {self.first}{worst}"


def bad_steps(opt_state: Any) -> tuple[Episode, ...]:
    """Returns the last episodes of bad steps that the watches in an optimizer's state have kept.

    Args:
      opt_state: the state of an optimizer, or any tree that holds one; on the host, between steps.

    Returns:
      A tuple of `Episode`, oldest first, that prints one per line. When the watch has no room left,
      the oldest episodes are dropped.

    Raises:
      ValueError: for the states of several runs at once (`vmap`), or anything that cannot be a
        state.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.watch()
    >>> state = tx.init({"w": jnp.ones(1)})
    >>> for batch, gradient in enumerate((1.0, jnp.nan, jnp.nan, 1.0)):
    ...     _, state = tx.update({"w": jnp.array([gradient])}, state, tag=batch)
    >>> print(*optaxclip.monitoring.bad_steps(state))
    steps 2 to 3, 2 bad; first: step 2 (tag 1): not finite, first in w
    """
    check_is_state(opt_state, "bad_steps")
    found = [
        bad
        for part in find_parts(opt_state)
        if isinstance(part, WatchState)
        for bad in read_episodes(part)
    ]
    return Findings(sorted(found, key=lambda bad: bad.first.step))


def read_episodes(w: WatchState) -> list[Episode]:
    """Returns the episodes of one watch, oldest first."""
    seen = jax.device_get(read_numbers(w))
    check_one_run(seen.total_steps)
    # In a tree without blocks the culprit is -1, which indexes the last name: the empty one.
    kept, names = seen.bad, (*unpack_names(w.blocks), "")

    def read(place, size):
        (step, block, tag, *_), (norm, ratio, share) = place.tolist(), size.tolist()
        return BadStep(step, norm, ratio, names[block], share, None if tag < 0 else tag)

    # Row 0 is a copy of the last episode. Positions in the ring do not give the order.
    found, numbers = [], kept.places[1:, 2, 4]
    for row in 1 + np.argsort(numbers):
        if kept.places[row, 2, 4] > 0:
            first, worst, last = map(read, kept.places[row], kept.sizes[row])
            found.append(Episode(first, worst, last, int(kept.places[row, 2, 3]), {}))
    if found:
        ring = kept.recent[numbers.max() % 2]
        found[-1] = found[-1]._replace(norms=_read_norms(ring, found[-1], seen.total_steps, names))
    return found


def _read_norms(ring: Any, episode: Episode, steps: Any, names: tuple[str, ...]) -> dict:
    """Returns the norms of all blocks around the start of the last episode, by step."""
    # The step at which the ring stopped follows from the other steps, so it needs no counter.
    end = min(episode.first.step + AFTER, int(steps))
    if not np.isfinite(episode.worst.norm):
        end = min(end, episode.worst.step)
    return {
        step: dict(zip(names, ring[step % KEPT].tolist(), strict=False))
        for step in range(max(end - KEPT + 1, 1), end + 1)
    }


def check_one_run(steps: Any) -> None:
    """Raises ValueError for the state of several runs."""
    if np.ndim(steps):
        raise ValueError(
            f"This is the state of several runs, {np.shape(steps)}: pick one, jax.tree.map(lambda"
            " x: x[0], opt_state)."
        )
