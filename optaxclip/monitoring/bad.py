"""The last bad steps, for a post-mortem."""

from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.record import found_in
from optaxclip.watching.state import WatchState


def short(x: Any) -> str:
    """A number in three digits.

    >>> short(48.123), short(1.0), short(512.3), short(0.0), short(1.5e9)
    ('48.1', '1.0', '512', '0', '1.5e+09')
    """
    x = float(x)
    text = f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"
    return f"{text}.0" if len(text) == 1 and text != "0" else text


def percent(share: Any) -> str:
    """A share in percent."""
    return f"{float(share):.0%}".replace("%", " %")


def check_alone(steps: Any) -> None:
    """Raises if a state is that of several runs."""
    if np.ndim(steps):
        raise ValueError(
            f"This is the state of several runs, {np.shape(steps)}: pick one, jax.tree.map(lambda x: x[0], opt_state)."
        )


class BadStep(NamedTuple):
    """A step to look at after the run.

    Attributes:
      step: counted from 1.
      norm: the total norm.
      median_ratio: that norm over the median of the steps before.
      block: the first block that was not finite, or the one with the largest share.
      share: that block's share of the squared norm; of what was not finite, one over the number of such blocks.
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
            return f"step {self.step}{tag}: not finite, first in {self.block}"
        how = f"norm {short(self.norm)} = {short(self.median_ratio)} x the median"
        return f"step {self.step}{tag}: {how}; {percent(self.share)} of it in {self.block}"


def bad_steps(opt_state: Any) -> tuple[BadStep, ...]:
    """The last bad steps that the watches in an optimizer's state remember, oldest first.

    Args:
      opt_state: the state of an optimizer, or anything that holds one.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.watch()
    >>> state = tx.init({"w": jnp.ones(1)})
    >>> for batch, gradient in enumerate((1.0, jnp.nan, 1.0)):
    ...     _, state = tx.update({"w": jnp.array([gradient])}, state, tag=batch)
    >>> print(*optaxclip.bad_steps(state))
    step 2 (tag 1): not finite, first in w
    """
    found = [_bad_steps(w) for w in found_in(opt_state, WatchState)]
    return tuple(sorted((step for steps in found for step in steps), key=lambda bad: bad.step))


def _bad_steps(w: WatchState) -> list[BadStep]:
    check_alone(w.total_steps)
    ring, names = jax.device_get(w.bad), (*sorted(w.blocks), "")
    rows = sorted(zip(*(x.tolist() for x in ring[1:]), strict=True))
    return [
        BadStep(step, norm, ratio, names[block], share, None if tag < 0 else tag)
        for step, norm, ratio, block, share, tag in rows
        if step >= 0
    ]
