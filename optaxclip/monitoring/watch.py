"""A look at the gradients that changes nothing: which block, how unusual, and what a threshold would have done."""

import functools
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.core import check_names, params_of
from optaxclip.leaves import Exclude, as_exclude, measured_leaves
from optaxclip.measure import measure
from optaxclip.mesh import AxisNames, find_span
from optaxclip.norms import accumulator, l2
from optaxclip.record import named_blocks
from optaxclip.scopes import Scope, as_scope, leaf, tree
from optaxclip.thresholds.learned import number, whole
from optaxclip.thresholds.running import zscore
from optaxclip.watching.state import NotFinite, WatchState
from optaxclip.watching.step import Look, as_tag, empty_ring, last_not_finite, look_at, remembered
from optaxclip.watching.trackers import (
    Candidates,
    followed,
    fresh_shadows,
    fresh_trackers,
    named_candidates,
    named_levels,
    quantiles_of,
    shadowed,
)

_TYPICAL = {"0.1": 0.1, "0.5": 0.5, "1": 1.0, "5": 5.0, "z2.5": zscore(2.5)}
_KNOWN = 10  # norms that make a median


def watch(
    *,
    scope: Scope = leaf,
    top: int = 3,
    quantiles: Iterable[float] = (0.05, 0.5, 0.95),
    candidates: Candidates | None = None,
    bad_steps: int = 8,
    spike_factor: ArrayLike = 5.0,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Passes updates on as they are, and keeps what there is to know of them: g ← g.

    Put it first in a chain to see gradients, behind the optimizer to see steps. One read of the gradients, nothing
    goes to the host. Norms are Euclidean; the share of block i is ‖gᵢ‖² / Σ‖gⱼ‖². Quantiles are tracked in one number:
    they wander about the true ones by a tenth, and follow a lasting 100-fold change within 100 steps. No NaN, infinity
    or zero enters them, and no spike moves them by more than a step.

    Args:
      scope: which numbers share one norm: `leaf`, or `groups(label)`.
      top: how many blocks to keep of those with the largest share.
      quantiles: which quantiles of the total norm to track.
      candidates: thresholds to try in shadow, by name: numbers, schedules, or thresholds such as `zscore(2.5)`; or just
        numbers. Kept is the share of steps on which a clip of the whole tree by them would have clipped. None: 0.1,
        0.5, 1, 5 and `zscore(2.5)`.
      bad_steps: of how many of the last bad steps to keep the norm, the culprit and the tag.
      spike_factor: a step is bad if its norm is not finite, or over this many times the median of at least ten norms.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Returns:
      A transformation with a `WatchState`. Its `update` takes `tag=`, an integer such as the number of the batch, to be
      kept with a bad step; what else it is passed (the loss) goes to the candidates.

    Raises:
      ValueError: for numbers out of range, a scope without named blocks, or a bad `exclude`; at the update, for the
        state None, blocks other than those of `init`, or a tag that is no integer.

    Under `optax.MultiSteps` it sees what is applied if it is inside. `skip_spikes(optimizer)` puts back the state of
    all that it holds: to see the steps that it skips, write `optax.chain(watch(), skip_spikes(optimizer))`.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optaxclip.watch(candidates=[1.0, 10.0]), optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"decoder": jnp.ones(2), "encoder": jnp.ones(1)}
    >>> grads = {"decoder": jnp.array([3.0, 4.0]), "encoder": jnp.array([1.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params, tag=7)
    >>> seen = optaxclip.metrics(state)
    >>> float(seen["watch/would_clip/1"]), float(seen["watch/would_clip/10"])
    (1.0, 0.0)
    >>> print(optaxclip.explain(state))
    step 1: norm 5.1; 96 % of it in decoder; clipped to 1.0 (1 of 1 steps)
    """
    scope, exclude = as_scope(scope, "watch", named=True), as_exclude(exclude, "watch")
    top, bad_steps = whole(top, "watch", "top"), whole(bad_steps, "watch", "bad_steps")
    limit = number(spike_factor, "watch", "spike_factor", 1.0)
    levels, trials = named_levels(quantiles), named_candidates(_TYPICAL if candidates is None else candidates)

    @functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
    def measured(scope: Scope, paths: tuple[str, ...], arrays: list[jax.Array]) -> jax.Array:
        cut = scope.cut(paths, [x.shape for x in arrays])
        return measure(l2, arrays, cut, find_span(arrays, paths, axis_names)).norms

    def names_of(leaves) -> tuple[str, ...]:
        return scope.cut(leaves.paths, [x.shape for x in leaves.arrays]).names

    def init_fn(params):
        leaves = measured_leaves(params, exclude)
        names, dtype = names_of(leaves), accumulator(leaves.arrays)
        return _fresh(
            dtype,
            len(names),
            min(top, len(names)),
            bad_steps,
            quantiles=jnp.zeros(len(levels), dtype),
            would_clip=jnp.zeros(len(trials), jnp.int32),
            trackers=fresh_trackers(levels, jnp.zeros((), dtype)),
            shadows=fresh_shadows(trials, jnp.zeros((), dtype)),
            blocks=named_blocks(params, names, True),
            quantile_names=dict.fromkeys(levels),
            candidates=dict.fromkeys(trials),
        )

    def update_fn(updates, state, params=None, *, tag=None, **extra_args):
        if state is None:
            raise ValueError("watch has a history: write state = tx.init(params) once, not update(updates, None).")
        leaves = measured_leaves(updates, exclude)
        names, dtype = names_of(leaves), state.block_norms.dtype
        check_names(names, state.blocks)

        def param_norm() -> Any:
            return measured(tree, leaves.paths, params_of(leaves, params, exclude)).astype(dtype)

        look = look_at(measured(scope, leaves.paths, leaves.arrays).astype(dtype), names, state.top_blocks.shape[0])
        over, shadows = shadowed(trials, look.total, state.shadows, cast(Any, param_norm), extra_args)
        trackers = followed(levels, look.total, state.trackers)
        return updates, _after(state, look, limit, as_tag(tag))._replace(
            quantiles=quantiles_of(levels, trackers),
            would_clip=jnp.where(over, optax.safe_increment(state.would_clip), state.would_clip),
            trackers=trackers,
            shadows=shadows,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fresh(dtype, size: int, top: int, bad_steps: int, **learned: Any) -> WatchState:
    """The state before the first step, given what learns. Each array has a buffer of its own."""

    def none():
        return jnp.full((), -1, jnp.int32)

    def zero():
        return jnp.zeros((), jnp.int32)

    return WatchState(
        total_steps=zero(),
        total_norm=jnp.zeros((), dtype),
        median_ratio=jnp.ones((), dtype),
        block_norms=jnp.zeros(size, dtype),
        top_blocks=jnp.full(top, -1, jnp.int32),
        top_shares=jnp.zeros(top, dtype),
        nonfinite=NotFinite(zero(), none(), none(), none(), zero()),
        bad=empty_ring(bad_steps, dtype),
        **learned,
    )


def _after(state: WatchState, look: Look, limit: ArrayLike, tag: jax.Array) -> WatchState:
    """The state after one more step, but for what learns."""
    median, known = state.trackers.median.blocks.value, state.trackers.median.blocks.seen
    ratio = jnp.where(known > 0, look.total / median, 1)
    bad = (look.hit > 0) | ((known >= _KNOWN) & (ratio > jnp.asarray(limit).astype(ratio.dtype)))
    step = jnp.asarray(optax.safe_increment(state.total_steps))
    return state._replace(
        total_steps=step,
        total_norm=look.total,
        median_ratio=ratio,
        block_norms=look.norms,
        top_blocks=look.top_blocks,
        top_shares=look.top_shares,
        nonfinite=last_not_finite(state.nonfinite, look, step),
        bad=remembered(state.bad, bad, step, look, ratio, tag),
    )
