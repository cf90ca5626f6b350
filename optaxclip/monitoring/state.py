"""What a watch keeps: arrays of fixed shape and dtype from the first step, and names as the keys of dicts of Nones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class NotFinite(NamedTuple):
    """The last step whose gradients were not finite; -1 where there was none.

    Blocks are ordered as people count: `layers/2` comes before `layers/10`.

    Attributes:
      bad_total: int32, how many such steps there were.
      at_step: int32, the last of them, counted from 1.
      first: int32, the first block that was not finite, an index into the sorted names.
      last: int32, the last such block: backpropagation came to it before the others.
      blocks_hit: int32, how many blocks were not finite.
    """

    bad_total: jax.Array
    at_step: jax.Array
    first: jax.Array
    last: jax.Array
    blocks_hit: jax.Array


class BadRing(NamedTuple):
    """The last bad steps, a ring: those whose norm was not finite, or far over the median.

    Attributes:
      seen_total: int32, how many bad steps there were; the next goes to `seen_total % size`.
      at_steps: int32, the steps, counted from 1; -1 where there was none.
      norms: the total norms.
      ratios: norm over median.
      culprits: int32, the first block that was not finite, or the one with the largest share.
      shares: the culprit's share of the squared norm; of what was not finite, one over the number of such blocks.
      tags: int32, what `update` was called with as `tag=`; -1 for none.
    """

    seen_total: jax.Array
    at_steps: jax.Array
    norms: jax.Array
    ratios: jax.Array
    culprits: jax.Array
    shares: jax.Array
    tags: jax.Array


class WatchState(NamedTuple):
    """State of `watch`. Read it with `optaxclip.metrics`, `explain` and `bad_steps`.

    B is the number of blocks; norms are float32 (float64 for float64 leaves).

    Attributes:
      total_steps: int32, all steps.
      total_norm: the norm of all that is watched, at the last step.
      median_ratio: that norm over the median of the steps before; 1 at the first.
      block_norms: (B,), in the order of the sorted names.
      top_blocks: int32 (k,), the blocks with the largest shares of the squared norm, largest first.
      top_shares: (k,), their shares. At a step that is not finite, such blocks share it equally.
      nonfinite: see `NotFinite`.
      bad: see `BadRing`.
      quantiles: the quantiles of the total norm, in the order of their sorted names; 0 before the first norm.
      would_clip: int32, for each candidate threshold the steps that it would have clipped.
      trackers: what tracks the quantiles.
      shadows: the states of the candidate thresholds.
      blocks, quantile_names, candidates: names, as the keys of dicts of Nones.
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
    trackers: Any
    shadows: Any
    blocks: dict[str, None]
    quantile_names: dict[str, None]
    candidates: dict[str, None]


def scalars_of(w: WatchState, prefix: str) -> dict[str, jax.Array]:
    """A watch's state as a flat dict of scalars."""
    rates = w.would_clip / jnp.maximum(w.total_steps, 1)
    out = {
        "steps": w.total_steps,
        "grad_norm": w.total_norm,
        "median_ratio": w.median_ratio,
        "nonfinite_steps": w.nonfinite.bad_total,
        "nonfinite_step": w.nonfinite.at_step,
        "nonfinite_block": w.nonfinite.first,
        "bad_steps": w.bad.seen_total,
    }
    out |= {f"grad_norm/{name}": w.block_norms[i] for i, name in enumerate(sorted(w.blocks))}
    out |= {f"top_block/{i}": block for i, block in enumerate(w.top_blocks)}
    out |= {f"top_share/{i}": share for i, share in enumerate(w.top_shares)}
    out |= {f"quantile/{name}": w.quantiles[i] for i, name in enumerate(sorted(w.quantile_names))}
    out |= {f"would_clip/{name}": rates[i] for i, name in enumerate(sorted(w.candidates))}
    return {prefix + key: value for key, value in out.items()}
