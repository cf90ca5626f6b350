"""Summarizes one step: which block is to blame; and keeps the steps that went wrong."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip import xla
from optaxclip.norms import l2

KEPT = 8  # steps whose norms are kept; also the good steps that end an episode
AFTER = 4  # how many of the kept steps come after the first bad one
LONG_AGO = -KEPT - 1  # stands for the last bad step while there is none


class NotFinite(NamedTuple):
    """The last step whose gradients were not finite; -1 if there was none.

    First and last are in natural order, `layers/2` before `layers/10`.

    Attributes:
      bad_total: int32, the number of such steps.
      at_step: int32, the last of them, counted from 1.
      first: int32, the first block that was not finite, by its number in tree order.
      last: int32, the last such block, whose gradient backpropagation computed first.
      blocks_hit: int32, the number of such blocks.
    """

    bad_total: jax.Array
    at_step: jax.Array
    first: jax.Array
    last: jax.Array
    blocks_hit: jax.Array


class Summary(NamedTuple):
    """One step.

    Attributes:
      norms: (B,), the norms of the blocks.
      total: the norm of all blocks together.
      culprit, share: int32, the block with the largest share of the squared norm, and that share;
        if some blocks are not finite, the first of them, and one over their number.
      first, last, hit: int32, the first and the last block that is not finite (-1 if there is
        none), and their number.
    """

    norms: jax.Array
    total: jax.Array
    culprit: jax.Array
    share: jax.Array
    first: jax.Array
    last: jax.Array
    hit: jax.Array


def natural_key(name: str) -> list:
    """A key that sorts names in natural order: `layers/2` before `layers/10`.

    >>> sorted(["layers/10", "layers/2", "embed"], key=natural_key)
    ['embed', 'layers/2', 'layers/10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def summarize(norms: jax.Array, names: tuple[str, ...]) -> Summary:
    """Summarizes a step, given the norms of its blocks."""
    bad = ~jnp.isfinite(norms)
    first, last, hit = _find_ends(bad, names)
    # Blocks near the largest float may overflow together, but each of them is finite.
    finite_total = jnp.minimum(xla.join_lengths(l2, norms), jnp.finfo(norms.dtype).max)
    # A sum of norms keeps the difference between NaN and infinity.
    total = jnp.where(hit > 0, jnp.sum(norms), finite_total)
    # Only the largest: sorting all of them is a kernel by itself, and is done when they are read.
    largest = jnp.argmax(norms).astype(jnp.int32) if names else jnp.int32(-1)
    part = jnp.max(norms, initial=0) / jnp.where(total > 0, total, 1)
    even = 1 / jnp.maximum(hit, 1).astype(norms.dtype)
    share = jnp.where(hit > 0, even, jnp.minimum(jnp.square(part), 1))
    return Summary(norms, total, jnp.where(hit > 0, first, largest), share, first, last, hit)


@functools.partial(jax.jit, static_argnames="top", inline=True)
def rank_blocks(norms: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Ranks blocks by their share of the squared norm: (..., k), the largest, and these shares."""
    bad = ~jnp.isfinite(norms)
    broken = jnp.any(bad, axis=-1, keepdims=True)
    squares = jnp.square(norms / _unit(norms, broken))
    weights = jnp.where(broken, bad.astype(norms.dtype), squares)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    shares, blocks = lax.top_k(weights / jnp.where(sums > 0, sums, 1), top)
    return blocks.astype(jnp.int32), shares


def _unit(norms: jax.Array, broken: jax.Array) -> jax.Array:
    """Returns a divisor for norms, so that their squares neither overflow nor vanish."""
    largest = jnp.max(norms, axis=-1, keepdims=True, initial=0)
    # XLA may turn `x / unit` into `x * (1 / unit)`, which must not be flushed to zero.
    largest = jnp.minimum(largest, jnp.finfo(norms.dtype).max / 256)
    return jnp.where((largest > 0) & ~broken, largest, 1)


def _find_ends(bad: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first and last bad block in natural order, and the number of bad blocks."""
    order = np.array(sorted(range(len(names)), key=lambda i: natural_key(names[i])), np.int32)
    places, hit = np.argsort(order).astype(np.int32), jnp.sum(bad, dtype=jnp.int32)
    first = jnp.min(jnp.where(bad, places, len(names)), initial=len(names))
    last = jnp.max(jnp.where(bad, places, -1), initial=-1)
    # Without a bad block `first` is len(names) and `last` is -1: both index the -1 at the end.
    by_place = jnp.asarray(np.append(order, np.int32(-1)))
    return by_place[first], by_place[last], hit


def update_nonfinite(old: NotFinite, now: Summary, step: jax.Array) -> NotFinite:
    """Updates the record of the last step that was not finite."""
    total = jnp.asarray(optax.safe_increment(old.bad_total))
    new = NotFinite(total, step, now.first, now.last, now.hit)
    return jax.tree.map(lambda a, b: jnp.where(now.hit > 0, a, b), new, old)


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
