"""Keeps bad steps by episode, and the norms of the blocks around the last break."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.monitoring.summary import Summary

KEPT = 8  # steps whose norms are kept; also the good steps that end an episode
AFTER = 4  # how many of the kept steps come after the first bad one
LONG_AGO = -KEPT - 1  # stands for the last bad step while there is none


class Episodes(NamedTuple):
    """The last n episodes of bad steps: those not finite, or far above the median.

    An episode ends with eight good steps. Its first, worst and last step are kept, in this order.
    Row 0 is the last episode; rows 1 to n are a ring of all episodes.

    Attributes:
      places: int32 (n + 1, 3, 6), for each kept step: its number, counted from 1; its culprit, the
        first block that was not finite, or the one with the largest share; the `tag=` that `update`
        was called with, -1 for none; how many bad steps there were in this episode, how many
        episodes, and how many bad steps in all.
      sizes: (n + 1, 3, 3), for each kept step: its norm, its norm over the median, and the
        culprit's share of the squared norm; if not finite, one over the number of such blocks.
      recent: (2, 8, B), the norms of all blocks at the last 8 steps, step t in row t % 8. Ring
        n % 2 belongs to episode n and stops once it broke: after its first step that was not
        finite, and at the latest four steps after it began. The other ring continues.
    """

    places: jax.Array
    sizes: jax.Array
    recent: jax.Array


def fresh_episodes(dtype, blocks: int, room: int) -> Episodes:
    """Returns the record before the first episode."""
    nothing = np.array([LONG_AGO, -1, -1, 0, 0, 0], np.int32)
    return Episodes(
        places=jnp.array(np.broadcast_to(nothing, (room + 1, 3, 6))),
        sizes=jnp.zeros((room + 1, 3, 3), dtype),
        recent=jnp.zeros((2, KEPT, blocks), dtype),
    )


def update_episodes(
    old: Episodes, bad: jax.Array, step: jax.Array, now: Summary, ratio: jax.Array, tag: jax.Array
) -> Episodes:
    """Returns the episodes after one more step.

    It uses few arrays and no reduction: on a GPU each array, however small, is a kernel, and each
    sum is another. That is why the counts are stored with the places, and row 0 repeats the last
    episode.
    """
    first_step, last = old.places[0, 0, 0], old.places[0, 2]
    worst_norm, worst_ratio = old.sizes[0, 1, 0], old.sizes[0, 1, 1]
    begins = bad & (step - last[0] > KEPT)
    # No step is worse than the first that was not finite.
    broken = ~begins & ~jnp.isfinite(worst_norm)
    worse = begins | (~broken & ((now.hit > 0) | (ratio > worst_ratio)))
    length = jnp.where(begins, 1, optax.safe_increment(last[3]))
    episode = jnp.where(begins, optax.safe_increment(last[4]), last[4])
    place = jnp.stack([step, now.culprit, tag, length, episode, optax.safe_increment(last[5])])
    rows = jnp.arange(len(old.places), dtype=jnp.int32)
    # A select over all rows: an update at a traced index would be a scatter.
    here = bad & ((rows == 0) | (rows == 1 + jnp.mod(episode - 1, len(rows) - 1)))
    moments = here[:, None, None] & jnp.stack([begins, worse, jnp.bool_(True)])[None, :, None]
    # Only up to the first NaN: after it every block is NaN, which says nothing about the cause.
    moves = begins | (~broken & (step - first_step <= AFTER))
    return Episodes(
        places=jnp.where(moments, place[None, None], old.places),
        sizes=jnp.where(moments, jnp.stack([now.total, ratio, now.share])[None, None], old.sizes),
        recent=_push(old.recent, step, now.norms, moves, jnp.mod(episode, 2)),
    )


def _push(recent, step: jax.Array, norms: jax.Array, moves: jax.Array, own: jax.Array) -> jax.Array:
    """Writes the norms of this step to both rings; to ring `own` only if it moves."""
    # Two rings take turns, instead of copying one when an episode breaks: the copy would read out
    # of order, and XLA copies the whole of a donated array that is read that way.
    rows, rings = jnp.arange(KEPT, dtype=jnp.int32), jnp.arange(2, dtype=jnp.int32)
    here = (rows == jnp.mod(step, KEPT))[None] & (moves | (rings != own))[:, None]
    return jnp.where(here[..., None], norms, recent)
