"""What a watch keeps: arrays of fixed shape and dtype, and names as the keys of dicts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.monitoring.episodes import Episodes, fresh_episodes
from optaxclip.monitoring.summary import NotFinite
from optaxclip.record import unpack_names


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
      bad: see `Episodes`.
      quantiles: (q,), the quantiles of the total norm; 0 before the first norm.
      would_clip: int32 (c,), the steps that each candidate threshold would have clipped.
      trackers: see `Trackers`.
      shadows: the states of the candidate thresholds.
      histogram: int32 (B, 15), the elements of each block between powers of ten; None without
        `histogram=True`.
      blocks, quantile_names, candidates: names, as `optaxclip.record.pack_names` packs them.
    """

    total_steps: jax.Array
    total_norm: jax.Array
    median_ratio: jax.Array
    block_norms: jax.Array
    top_blocks: jax.Array
    top_shares: jax.Array
    nonfinite: NotFinite
    bad: Episodes
    quantiles: jax.Array
    would_clip: jax.Array
    trackers: Trackers
    shadows: Any
    histogram: Any
    blocks: Any
    quantile_names: Any
    candidates: Any


def fresh_watch(
    dtype, *, size: int, top: int, bad_steps: int, levels: int, **rest: Any
) -> WatchState:
    """The state before the first step. Each array has its own buffer, for donation.

    Args:
      dtype: of the norms.
      size, top, bad_steps, levels: how many blocks, top blocks, episodes of bad steps and quantiles
        it has room for.
      rest: the fields that are made elsewhere: names, and the states of the candidates.
    """

    def zeros(*shape, dtype=dtype):
        return jnp.zeros(shape, dtype)

    def count(*shape):
        return jnp.zeros(shape, jnp.int32)

    def none(*shape):
        return jnp.full(shape, -1, jnp.int32)

    return WatchState(
        total_steps=count(),
        total_norm=zeros(),
        median_ratio=jnp.ones((), dtype),
        block_norms=zeros(size),
        top_blocks=none(top),
        top_shares=zeros(top),
        nonfinite=NotFinite(count(), none(), none(), none(), count()),
        bad=fresh_episodes(dtype, size, bad_steps),
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
        "bad_steps": w.bad.places[..., 0, 2, 5],
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
