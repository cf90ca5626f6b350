"""The state of a watch: arrays of fixed shape and dtype, and names as the keys of dicts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.monitoring.summary import Episodes, NotFinite, fresh_episodes, rank_blocks
from optaxclip.trees import unpack_names

Packed = dict[str, jax.Array]


class Trackers(NamedTuple):
    """The median of the total norm, and other quantiles as multiples of it.

    Attributes:
      median: 0 before the first norm.
      seen: int32, how many norms the median has learned from.
      run: int32, how many consecutive norms were above the median; negative for below.
      multiples: (q,), quantiles of norm over median.
      multiples_seen: int32, how many norms these have learned from.
    """

    median: jax.Array
    seen: jax.Array
    run: jax.Array
    multiples: jax.Array
    multiples_seen: jax.Array


class Numbers(NamedTuple):
    """The numbers of a watch, before they are packed.

    Attributes:
      total_steps: int32, all steps.
      total_norm: the norm of all blocks together at the last step.
      median_ratio: that norm divided by the median of the steps before; 1 at the first step.
      nonfinite: see `NotFinite`.
      bad: see `Episodes`.
      trackers: see `Trackers`.
      would_clip: int32 (c,), how many steps each candidate threshold would have clipped.
    """

    total_steps: jax.Array
    total_norm: jax.Array
    median_ratio: jax.Array
    nonfinite: NotFinite
    bad: Episodes
    trackers: Trackers
    would_clip: jax.Array


class WatchState(NamedTuple):
    """State of `watch`. Read it with `optaxclip.metrics`, `explain` and `bad_steps`.

    B is the number of blocks; norms are float32 (float64 for float64 leaves). Values that follow
    from other fields are not kept: shares of blocks and quantiles are computed when they are read.

    Attributes:
      packed: `Numbers` and the states of the candidate thresholds, see `pack`.
      block_norms: (B,), in tree order.
      histogram: int32 (B, 15), the number of elements of each block between powers of ten; None
        without `histogram=True`.
      blocks, ranks, episodes, quantiles, candidates: names of the entries of these arrays, packed
        by `optaxclip.trees.pack_names`.
    """

    packed: Packed
    block_norms: jax.Array
    histogram: Any
    blocks: Any
    ranks: Any
    episodes: Any
    quantiles: Any
    candidates: Any


# Compiled like the functions below, because outside `jit` each slice would be a separate call.
@functools.partial(jax.jit, inline=True)
def pack(tree: Any) -> Packed:
    """Packs the numbers of a tree into one vector per dtype, in the order of the leaves.

    float32 numbers are stored as bits among the int32: a second array would be two more kernels,
    its update and, since it is donated and read out of order, a copy of it.
    """
    vectors: dict[str, list[jax.Array]] = {}
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        if x.dtype == jnp.float32:
            x = lax.bitcast_convert_type(x, jnp.int32)
        vectors.setdefault(str(x.dtype), []).append(x.ravel())
    return {name: jnp.concatenate(parts) for name, parts in vectors.items()}


@functools.partial(jax.jit, static_argnames="like", inline=True)
def unpack(packed: Packed, like: Any) -> Any:
    """Unpacks the tree, or the first part of it, given the shapes of its leaves.

    Leading axes of the vectors, as `vmap` adds them, become leading axes of each leaf.
    """
    leaves, structure = jax.tree.flatten(like)
    read, starts = [], dict.fromkeys(packed, 0)
    for x in leaves:
        floats = x.dtype == jnp.float32
        name = "int32" if floats else str(x.dtype)
        start, vector = starts[name], packed[name]
        starts[name] = stop = start + x.size
        x = vector[..., start:stop].reshape(vector.shape[:-1] + x.shape)
        read.append(lax.bitcast_convert_type(x, jnp.float32) if floats else x)
    return structure.unflatten(read)


def fresh_numbers(dtype, *, blocks: int, episodes: int, quantiles: int, candidates: int) -> Numbers:
    """Returns the numbers before the first step, given how many entries there are of each kind."""
    zero, count, none = jnp.zeros((), dtype), jnp.int32(0), jnp.int32(-1)
    return Numbers(
        total_steps=count,
        total_norm=zero,
        median_ratio=jnp.ones((), dtype),
        nonfinite=NotFinite(count, none, none, none, count),
        bad=fresh_episodes(dtype, blocks, episodes),
        trackers=Trackers(zero, count, count, jnp.zeros(quantiles, dtype), count),
        would_clip=jnp.zeros(candidates, jnp.int32),
    )


def read_numbers(w: WatchState) -> Numbers:
    """Reads the numbers of a watch; for a batch of runs each has the batch's axes in front."""
    rooms = ("blocks", "episodes", "quantiles", "candidates")
    return unpack(w.packed, _shapes(w.block_norms.dtype, *(len(getattr(w, x)) for x in rooms)))


# Cached, because tracing would take longer than the rest of the reading.
@functools.lru_cache(maxsize=64)
def _shapes(dtype, blocks: int, episodes: int, quantiles: int, candidates: int) -> Numbers:
    rooms = {"blocks": blocks, "episodes": episodes, "quantiles": quantiles}
    return jax.eval_shape(lambda: fresh_numbers(dtype, **rooms, candidates=candidates))


def read_top(w: WatchState, seen: Numbers) -> tuple[jax.Array, jax.Array]:
    """Reads the blocks with the largest shares of the squared norm, and these shares.

    Blocks are -1 before the first step. If some blocks are not finite, they have equal shares.
    """
    blocks, shares = rank_blocks(w.block_norms, len(w.ranks))
    return jnp.where(seen.total_steps[..., None] > 0, blocks, -1), shares


def read_quantiles(w: WatchState, seen: Numbers) -> jax.Array:
    """Reads the quantiles of the total norm, (..., q), which are 0 before the first norm."""
    learned, levels = seen.trackers, unpack_names(w.quantiles)
    multiples = jnp.where(np.array([q == "0.5" for q in levels], bool), 1, learned.multiples)
    # Before its first norm a multiple is 0, and so is the quantile.
    return jnp.where(learned.seen[..., None] > 0, learned.median[..., None] * multiples, 0)


def watch_scalars(w: WatchState, prefix: str) -> dict[str, jax.Array]:
    """Reads a watch as a flat dict of scalars; each has the shape of the batch of runs."""
    seen = read_numbers(w)
    top_blocks, top_shares = read_top(w, seen)
    out = {
        "steps": seen.total_steps,
        "grad_norm": seen.total_norm,
        "median_ratio": seen.median_ratio,
        "nonfinite_steps": seen.nonfinite.bad_total,
        "nonfinite_step": seen.nonfinite.at_step,
        "nonfinite_block": seen.nonfinite.first,
        "bad_steps": seen.bad.places[..., 0, 2, 5],
    }
    # Indices count from the last axis, because a batch of runs adds axes in front.
    rates = seen.would_clip / jnp.maximum(seen.total_steps, 1)[..., None]
    several = {
        "grad_norm": (w.blocks, w.block_norms),
        "top_block": (w.ranks, top_blocks),
        "top_share": (w.ranks, top_shares),
        "quantile": (w.quantiles, read_quantiles(w, seen)),
        "would_clip": (w.candidates, rates),
    }
    for key, (packed, values) in several.items():
        names = unpack_names(packed)
        # A single bare array is one block without a name, and the total covers it.
        out |= {f"{key}/{name}": values[..., i] for i, name in enumerate(names) if names != ("",)}
    return {prefix + key: value for key, value in out.items()}
