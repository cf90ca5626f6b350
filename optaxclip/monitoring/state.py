"""What a watch keeps: arrays of fixed shape and dtype, and names as the keys of dicts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.record import unpack_names


class NotFinite(NamedTuple):
    """The last step whose gradients were not finite; -1 where there was none.

    First and last are meant as people count, `layers/2` before `layers/10`.

    Attributes:
      bad_total: int32, the number of such steps.
      at_step: int32, the last of them, counted from 1.
      first: int32, the first block that was not finite, by its number in tree order.
      last: int32, the last such block, whose gradient backpropagation computed before the others.
      blocks_hit: int32, the number of such blocks.
    """

    bad_total: jax.Array
    at_step: jax.Array
    first: jax.Array
    last: jax.Array
    blocks_hit: jax.Array


class BadRing(NamedTuple):
    """A ring buffer of the last bad steps: those not finite, or far above the median.

    Attributes:
      seen_total: int32, the number of bad steps; the next one is written to `seen_total % size`.
      at_steps: int32, the steps, counted from 1; -1 for an empty place.
      norms: the total norms.
      ratios: norm over median.
      culprits: int32, the first block that was not finite, or the one with the largest share.
      shares: the culprit's share of the squared norm; if not finite, one over the number of such
        blocks.
      tags: int32, what `update` was called with as `tag=`; -1 for none.
    """

    seen_total: jax.Array
    at_steps: jax.Array
    norms: jax.Array
    ratios: jax.Array
    culprits: jax.Array
    shares: jax.Array
    tags: jax.Array


class Trackers(NamedTuple):
    """The median of the total norm, and other quantiles as multiples of it.

    Attributes:
      median: 0 before the first norm.
      seen: int32, the norms that the median has learned from.
      run: int32, the consecutive norms above the median; those below it, negative.
      multiples: (q,), quantiles of norm over median.
      multiples_seen: int32, the norms that these have learned from.
    """

    median: jax.Array
    seen: jax.Array
    run: jax.Array
    multiples: jax.Array
    multiples_seen: jax.Array


class WatchState(NamedTuple):
    """State of `watch`. Read it with `optaxclip.metrics`, `explain` and `bad_steps`.

    B is the number of blocks; norms are float32 (float64 for float64 leaves).

    Attributes:
      total_steps: int32, all steps.
      total_norm: the norm of all blocks together, at the last step.
      median_ratio: that norm over the median of the steps before; 1 at the first.
      block_norms: (B,), in tree order.
      top_blocks: int32 (k,), the blocks with the largest shares of the squared norm, largest first.
      top_shares: (k,), their shares. At a step that is not finite, such blocks share it equally.
      nonfinite: see `NotFinite`.
      bad: see `BadRing`.
      quantiles: (q,), the quantiles of the total norm; 0 before the first norm.
      would_clip: int32 (c,), the steps that each candidate threshold would have clipped.
      trackers: see `Trackers`.
      shadows: the states of the candidate thresholds.
      blocks, quantile_names, candidates: names, as `optaxclip.record.pack_names` packs them.
    """

    total_steps: jax.Array
    total_norm: jax.Array
    median_ratio: jax.Array
    block_norms: jax.Array
    top_blocks: jax.Array
    top_shares: jax.Array
    nonfinite: NotFinite
    bad: BadRing
    quantiles: jax.Array
    would_clip: jax.Array
    trackers: Trackers
    shadows: Any
    blocks: Any
    quantile_names: Any
    candidates: Any


def fresh_watch(
    dtype, *, size: int, top: int, bad_steps: int, levels: int, **rest: Any
) -> WatchState:
    """The state before the first step. Each array has its own buffer, for donation.

    Args:
      dtype: of the norms.
      size, top, bad_steps, levels: how many blocks, top blocks, bad steps and quantiles it has room
        for.
      rest: the fields that are made elsewhere: names, and the states of the candidates.
    """

    def zeros(*shape, dtype=dtype):
        return jnp.zeros(shape, dtype)

    def count(*shape):
        return jnp.zeros(shape, jnp.int32)

    def none(*shape):
        return jnp.full(shape, -1, jnp.int32)

    n = bad_steps
    return WatchState(
        total_steps=count(),
        total_norm=zeros(),
        median_ratio=jnp.ones((), dtype),
        block_norms=zeros(size),
        top_blocks=none(top),
        top_shares=zeros(top),
        nonfinite=NotFinite(count(), none(), none(), none(), count()),
        bad=BadRing(count(), none(n), zeros(n), zeros(n), none(n), zeros(n), none(n)),
        quantiles=zeros(levels),
        would_clip=count(len(rest["shadows"])),
        trackers=Trackers(zeros(), count(), count(), zeros(levels), count()),
        **rest,
    )


def watch_scalars(w: WatchState, prefix: str) -> dict[str, jax.Array]:
    """The state of a watch as a flat dict of scalars; each has the shape of the batch of runs."""
    out = {
        "steps": w.total_steps,
        "grad_norm": w.total_norm,
        "median_ratio": w.median_ratio,
        "nonfinite_steps": w.nonfinite.bad_total,
        "nonfinite_step": w.nonfinite.at_step,
        "nonfinite_block": w.nonfinite.first,
        "bad_steps": w.bad.seen_total,
    }
    # Indices count from the end: in front there may be the axes of a batch of runs.
    rates = w.would_clip / jnp.maximum(w.total_steps, 1)[..., None]
    several = {
        "grad_norm": (unpack_names(w.blocks), w.block_norms),
        "top_block": (range(w.top_blocks.shape[-1]), w.top_blocks),
        "top_share": (range(w.top_shares.shape[-1]), w.top_shares),
        "quantile": (unpack_names(w.quantile_names), w.quantiles),
        "would_clip": (unpack_names(w.candidates), rates),
    }
    for key, (names, values) in several.items():
        # One bare array is a block without a name: the total says all of it.
        out |= {f"{key}/{name}": values[..., i] for i, name in enumerate(names) if names != ("",)}
    return {prefix + key: value for key, value in out.items()}
