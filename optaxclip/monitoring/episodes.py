"""Bad steps by episode, and the norms of the blocks around the last break."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.monitoring.summary import Summary

KEPT = 8  # steps whose norms are kept, and good steps that end an episode
AFTER = 4  # of them, those after the first bad step


class Episodes(NamedTuple):
    """The last episodes of bad steps: those not finite, or far above the median.

    An episode ends with eight good steps. n is the number of episodes that there is room for. Of
    each its first, worst and last step are kept, in this order.

    Attributes:
      bad_total: int32, the number of bad steps.
      total: int32, the number of episodes; the next one is written to `total % n`.
      places: int32 (n, 3, 3), of each such step its number, counted from 1, its culprit, and what
        `update` was called with as `tag=`; -1 for none. The culprit is the first block that was not
        finite, or the one with the largest share.
      sizes: (n, 3, 3), its norm, norm over median, and the culprit's share of the squared norm; if
        not finite, one over the number of such blocks.
      lengths: int32 (n,), the number of bad steps.
      first_step, last_step, worst: of the last episode its first and its last bad step, and how far
        its worst one was over the median.
      frozen_step: int32, the last step in the second of `recent`.
      recent: (2, 8, B), the norms of all blocks at the last 8 steps, step t in row t % 8; and as
        they were when the last episode broke: at its first step that was not finite, at the latest
        four steps after it began.
    """

    bad_total: jax.Array
    total: jax.Array
    places: jax.Array
    sizes: jax.Array
    lengths: jax.Array
    first_step: jax.Array
    last_step: jax.Array
    worst: jax.Array
    frozen_step: jax.Array
    recent: jax.Array


def fresh_episodes(dtype, blocks: int, room: int) -> Episodes:
    """No episode yet."""

    def none(*shape):
        return jnp.full(shape, -1, jnp.int32)

    def count(*shape):
        return jnp.zeros(shape, jnp.int32)

    return Episodes(
        bad_total=count(),
        total=count(),
        places=none(room, 3, 3),
        sizes=jnp.zeros((room, 3, 3), dtype),
        lengths=count(room),
        # Long ago, so that the first bad step begins an episode.
        first_step=jnp.full((), -KEPT - 1, jnp.int32),
        last_step=jnp.full((), -KEPT - 1, jnp.int32),
        worst=jnp.zeros((), dtype),
        frozen_step=none(),
        recent=jnp.zeros((2, KEPT, blocks), dtype),
    )


def update_episodes(
    old: Episodes, bad: jax.Array, step: jax.Array, now: Summary, ratio: jax.Array, tag: jax.Array
) -> Episodes:
    """The episodes after one more step. Elementwise, with no reduction: it fuses into few kernels.

    What it needs of the last episode is kept in scalars, for it is somewhere in the arrays.
    """
    begins = bad & (step - old.last_step > KEPT)
    score = jnp.where(now.hit > 0, np.asarray(np.inf, ratio.dtype), ratio)
    worse = begins | (score > old.worst)
    total = jnp.where(begins, optax.safe_increment(old.total), old.total)
    first = jnp.where(begins, step, old.first_step)
    # Only up to the first NaN: after it every block is NaN, and says nothing of the cause.
    freezes = bad & (begins | (jnp.isfinite(old.worst) & (step - first <= AFTER)))
    size = old.lengths.shape[0]
    # A select over all places, not an update at a traced index: that would be a scatter.
    here = bad & (jnp.arange(size, dtype=jnp.int32) == jnp.mod(total - 1, size))
    moments = here[:, None, None] & jnp.stack([begins, worse, jnp.bool_(True)])[None, :, None]
    culprit, share = _blame(now)
    place, sizes = jnp.stack([step, culprit, tag]), jnp.stack([now.total, ratio, share])
    longer = jnp.where(begins, 1, optax.safe_increment(old.lengths))
    return Episodes(
        bad_total=jnp.where(bad, optax.safe_increment(old.bad_total), old.bad_total),
        total=total,
        places=jnp.where(moments, place[None, None], old.places),
        sizes=jnp.where(moments, sizes[None, None], old.sizes),
        lengths=jnp.where(here, longer, old.lengths),
        first_step=first,
        last_step=jnp.where(bad, step, old.last_step),
        worst=jnp.where(bad & worse, score, old.worst),
        frozen_step=jnp.where(freezes, step, old.frozen_step),
        recent=_push(old.recent, step, now.norms, freezes),
    )


def _blame(now: Summary) -> tuple[jax.Array, jax.Array]:
    """The number of the culprit, -1 of a tree without blocks, and its share."""
    if not now.top_blocks.shape[0]:
        return jnp.int32(-1), jnp.zeros_like(now.total)
    return jnp.where(now.hit > 0, now.first, now.top_blocks[0]), now.top_shares[0]


def _push(recent: jax.Array, step: jax.Array, norms: jax.Array, freezes: jax.Array) -> jax.Array:
    """The norms of the last steps with those of this one, and the copy that is frozen."""
    row = jnp.arange(KEPT, dtype=jnp.int32)[:, None] == jnp.mod(step, KEPT)
    last = jnp.where(row, norms[None], recent[0])
    return jnp.stack([last, jnp.where(freezes, last, recent[1])])
