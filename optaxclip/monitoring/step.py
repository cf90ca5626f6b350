"""One step, looked at: which block holds how much of it, which one to blame, and whether to remember it."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip.watching.state import BadRing, NotFinite


class Look(NamedTuple):
    """What one step is.

    Attributes:
      norms: of the blocks.
      total: of all of them.
      top_blocks, top_shares: the blocks with the largest shares.
      first, last, hit: int32, the first and the last block that are not finite, -1 if all are, and how many there are.
    """

    norms: jax.Array
    total: jax.Array
    top_blocks: jax.Array
    top_shares: jax.Array
    first: jax.Array
    last: jax.Array
    hit: jax.Array


def natural(name: str) -> list:
    """A key that sorts names as people count: `layers/2` before `layers/10`.

    >>> sorted(["layers/10", "layers/2", "embed"], key=natural)
    ['embed', 'layers/2', 'layers/10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def look_at(norms: jax.Array, names: tuple[str, ...], top: int) -> Look:
    """Looks at the norms of the blocks of one step."""
    bad = ~jnp.isfinite(norms)
    largest = jnp.max(norms, initial=0)
    largest = jnp.minimum(largest, jnp.finfo(norms.dtype).max / 256)  # XLA multiplies by 1/unit: that must not vanish
    unit = jnp.where((largest > 0) & ~jnp.any(bad), largest, 1)
    squares = jnp.square(norms / unit)  # of shares: they neither overflow nor vanish
    total = jnp.where(jnp.any(bad), jnp.sum(norms), _bounded(unit * jnp.sqrt(jnp.sum(squares))))
    weights = jnp.where(jnp.any(bad), bad.astype(norms.dtype), squares)
    sums = jnp.sum(weights)
    shares, blocks = lax.top_k(weights / jnp.where(sums > 0, sums, 1), top)
    return Look(norms, total, blocks.astype(jnp.int32), shares, *_ends(bad, names))


def _bounded(norm: jax.Array) -> jax.Array:
    """A norm of finite numbers is finite: the largest float, where it is beyond it."""
    return jnp.minimum(norm, jnp.finfo(norm.dtype).max)


def _ends(bad: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first and the last bad block, and how many there are."""
    order = np.array(sorted(range(len(names)), key=lambda i: natural(names[i])), np.int32)
    places, hit = np.argsort(order).astype(np.int32), jnp.sum(bad, dtype=jnp.int32)
    first = jnp.min(jnp.where(bad, places, len(names)), initial=len(names))
    last = jnp.max(jnp.where(bad, places, -1), initial=-1)
    by_place = jnp.asarray(np.append(order, np.int32(-1)))  # the last entry, -1, is met from both ends
    return by_place[first], by_place[last], hit


def last_not_finite(old: NotFinite, look: Look, step: jax.Array) -> NotFinite:
    """The record of the last step that was not finite, after one more step."""
    total = jnp.asarray(optax.safe_increment(old.bad_total))
    new = NotFinite(total, step, look.first, look.last, look.hit)
    return jax.tree.map(lambda a, b: jnp.where(look.hit > 0, a, b), new, old)


def empty_ring(size: int, dtype) -> BadRing:
    """A ring without a step."""

    def none():
        return jnp.full(size, -1, jnp.int32)

    return BadRing(
        jnp.zeros((), jnp.int32),
        none(),
        jnp.zeros(size, dtype),
        jnp.zeros(size, dtype),
        none(),
        jnp.zeros(size, dtype),
        none(),
    )


def remembered(ring: BadRing, bad: jax.Array, step: jax.Array, look: Look, ratio: jax.Array, tag: jax.Array) -> BadRing:
    """The ring with one more step in it, if that is bad."""
    size = ring.at_steps.shape[0]
    here = bad & (jnp.arange(size, dtype=jnp.int32) == jnp.mod(ring.seen_total, size))
    if look.top_blocks.shape[0]:
        culprit, share = jnp.where(look.hit > 0, look.first, look.top_blocks[0]), look.top_shares[0]
    else:
        culprit, share = jnp.int32(-1), jnp.zeros_like(look.total)
    seen = jnp.where(bad, optax.safe_increment(ring.seen_total), ring.seen_total)
    new = (step, look.total, ratio, culprit, share, tag)
    return BadRing(seen, *(jnp.where(here, x, old) for x, old in zip(new, ring[1:], strict=True)))


def as_tag(tag) -> jax.Array:
    """A tag as int32; -1 for None.

    Raises:
      ValueError: if it is not one integer.
    """
    if tag is None:
        return jnp.int32(-1)
    known = isinstance(tag, int | np.generic | np.ndarray | jax.Array)
    if not known or jnp.ndim(tag) or not jnp.issubdtype(jnp.result_type(tag), jnp.integer):
        raise ValueError(f"watch: tag must be one integer, such as the number of the batch; got {tag!r}.")
    return jnp.asarray(tag).astype(jnp.int32)
