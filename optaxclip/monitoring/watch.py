"""Monitors without clipping: which block, how unusual, what a threshold would do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import thresholds, validate, xla
from optaxclip.actions import keep
from optaxclip.base import AxisNames, Exclude, Norms, Scope
from optaxclip.core import decide
from optaxclip.engine import Description, Rule, build, guarded
from optaxclip.monitoring import trackers
from optaxclip.monitoring.histograms import BINS, count_elements
from optaxclip.monitoring.state import Numbers, WatchState, fresh_numbers, pack, unpack
from optaxclip.monitoring.summary import Summary, summarize, update_episodes, update_nonfinite
from optaxclip.norms import l2
from optaxclip.scopes.leaves import as_scope, leaf, tree
from optaxclip.thresholds.blocks import reads_params
from optaxclip.thresholds.fixed import unchecked
from optaxclip.trees import match_params, pack_names, select, unpack_names

# The names are keys in users' dashboards.
_TYPICAL = {"0.1": 0.1, "0.5": 0.5, "1": 1.0, "5": 5.0, "z2.5": thresholds.zscore(2.5)}
_KNOWN = 10  # norms needed for a median


@validate.named
def watch(
    *,
    scope: Scope = leaf,
    top: int = 3,
    quantiles: Iterable[float] = (0.05, 0.5, 0.95),
    candidates: trackers.Candidates | None = None,
    bad_steps: int = 8,
    spike_factor: ArrayLike = 5.0,
    histogram: bool = False,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the updates as they are, and keeps statistics of their norms: g ← g.

    First in a chain it sees gradients, after the optimizer it sees steps. Put it before any clip:
    after one it would see no norm over the bound. It reads the gradients once, and nothing goes to
    the host. Norms are Euclidean; the share of block i is ‖gᵢ‖² / Σ‖gⱼ‖². Each quantile is tracked
    in one number, which is within about a tenth of the true one and follows a lasting 100-fold
    change within 100 steps. NaN, infinity and zero do not enter it, and a spike moves it by at most
    one step.

    Args:
      scope: which numbers share one norm: `scopes.leaf`, `scopes.groups(label)`, or
        `scopes.stacked(where)` for single layers of leaves that stack layers.
      top: how many of the blocks with the largest share to keep.
      quantiles: which quantiles of the total norm to track.
      candidates: thresholds to try without clipping, by name: numbers, schedules, or thresholds
        such as `thresholds.zscore(2.5)`; or a list of numbers. For each it records the share of
        steps at which a clip of the whole tree would have clipped. None: 0.1, 0.5, 1, 5 and
        `zscore(2.5)`.
      bad_steps: how many of the last episodes of bad steps to keep: the first, worst and last step
        of each, with norm, culprit and tag. Eight good steps end an episode.
      spike_factor: a step is bad if its norm is not finite, or more than this many times the median
        of at least ten norms.
      histogram: whether to count the elements of each block by powers of ten, at each step, for
        `optaxclip.loggers.histograms`. On a CPU this needs a second read of the gradients.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Returns:
      A transformation with a `WatchState`. Its `update` takes `tag=`, an integer such as the number
      of the batch, which is kept with a bad step; other arguments, such as the loss, go to the
      candidates.

    Raises:
      ValueError: for numbers out of range, a scope without named blocks, or an invalid `exclude`;
        at the update, for the state None or another transformation's, or a tag that is not one
        integer.

    Inside `optax.MultiSteps` it sees what is applied. `skip_spikes(optimizer)` restores the state
    of everything inside it: to see the steps that it skips, write
    `optax.chain(watch(), skip_spikes(optimizer))`.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> watch = optaxclip.watch(candidates=[1.0, 10.0])
    >>> tx = optax.chain(watch, optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> params = {"decoder": jnp.ones(2), "encoder": jnp.ones(1)}
    >>> grads = {"decoder": jnp.array([3.0, 4.0]), "encoder": jnp.array([1.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params, tag=7)
    >>> seen = optaxclip.metrics(state)
    >>> float(seen["watch/would_clip/1"]), float(seen["watch/would_clip/10"])
    (1.0, 0.0)
    >>> print(optaxclip.explain(state))
    step 1: norm 5.1; 96 % of it in decoder; clipped to 1.0 (1 of 1 steps)
    """
    validate.size(top=top, bad_steps=bad_steps)
    validate.at_least(1, spike_factor=spike_factor)
    validate.flag(histogram=histogram)
    levels = trackers.name_levels(quantiles)
    trials = trackers.name_candidates(_TYPICAL if candidates is None else candidates)
    blocks = _meter(as_scope(scope, named=True), exclude, axis_names)
    whole = _meter(tree, exclude, axis_names)

    def size_of(params, updates):
        """Returns the norm of all parameters that have an update."""
        leaves = select(updates, exclude)
        own = match_params(leaves, params, exclude, "watch")
        return _measure(whole, leaves.rebuild(own))[0]

    def start(norms):
        """Returns the numbers before the first step, and the states of the candidates."""
        rooms = {"episodes": bad_steps, "quantiles": len(levels), "candidates": len(trials)}
        numbers = fresh_numbers(norms.dtype, blocks=len(norms), **rooms)
        return numbers, trackers.start_candidates(trials, norms.dtype)

    # Without this an update outside `jit` would trace `start` at every step. Not `lru_cache`, whose
    # wrapper cannot be pickled: some trainers pickle their optimizer.
    traced: dict[Any, Any] = {}

    def shapes_of(norms):
        key = (norms.dtype, norms.shape)
        if key not in traced:
            traced[key] = jax.eval_shape(start, jax.ShapeDtypeStruct(norms.shape, norms.dtype))
        return traced[key]

    def init_fn(params):
        norms, names = _start(blocks, params)
        return WatchState(
            packed=pack(start(norms)),
            block_norms=norms,
            histogram=jnp.zeros((len(norms), BINS), jnp.int32) if histogram else None,
            blocks=names,
            ranks=pack_names(list(map(str, range(min(top, len(norms)))))),
            episodes=pack_names(list(map(str, range(bad_steps)))),
            quantiles=pack_names(tuple(levels)),
            candidates=pack_names(tuple(trials)),
        )

    def update_fn(updates, state, params, *, tag=None, **extra_args):
        (norms, names), dtype = _measure(blocks, updates), state.block_norms.dtype
        now = summarize(norms.astype(dtype), names)
        numbers, shadows = unpack(state.packed, shapes_of(state.block_norms))
        size = None
        if params is not None and reads_params(*trials.values()):
            size = size_of(params, updates).astype(dtype)
        over, shadows = trackers.try_candidates(trials, now.total, shadows, size, extra_args)
        counted = optax.safe_increment(numbers.would_clip)
        numbers = _advance(numbers, now, spike_factor, _as_tag(tag))._replace(
            trackers=trackers.update_trackers(levels, now.total, numbers.trackers),
            would_clip=jnp.where(over, counted, numbers.would_clip),
        )
        return updates, state._replace(
            packed=pack((numbers, shadows)),
            block_norms=now.norms,
            histogram=count_elements(updates, scope, exclude, axis_names) if histogram else None,
        )

    about = Description(scope, l2, exclude=exclude, kind="other")
    return guarded(WatchState, init_fn, update_fn, about)


def _meter(
    scope: Scope, exclude: Exclude, axis_names: AxisNames | None
) -> optax.GradientTransformationExtraArgs:
    """Builds a clip that only measures: the engine without an action."""

    def measure(leaves, layout) -> Norms:
        return xla.measure(l2, leaves.arrays, layout)

    def leave_alone(leaves, layout, norms, bounds):
        return leaves.arrays, decide(norms, bounds, keep, 1.0)

    about = Description(scope, l2, unchecked(np.inf), exclude=exclude)
    return build(about, Rule(measure, leave_alone), axis_names)


def _start(meter: optax.GradientTransformationExtraArgs, params: Any) -> tuple[jax.Array, Any]:
    """Returns a zero norm for each block, and the packed names of the blocks."""
    state: Any = meter.init(params)
    return state.metrics.grad_norm, state.metrics.blocks


def _measure(
    meter: optax.GradientTransformationExtraArgs, updates: Any
) -> tuple[jax.Array, tuple[str, ...]]:
    """Returns the norms of the blocks of a tree, and their names."""
    # The fresh state costs nothing under `jit`, because the counters of a meter are not read.
    state: Any = meter.update(updates, meter.init(updates))[1]
    return state.metrics.grad_norm, unpack_names(state.metrics.blocks)


def _advance(old: Numbers, now: Summary, limit: ArrayLike, tag: jax.Array) -> Numbers:
    """Updates the numbers, except those that learn from norms."""
    # This is the median of the steps before, so that a spike is judged before it is learned.
    median, known = old.trackers.median, old.trackers.seen
    # Divides by 1 at first, because `checkify` reports a division by zero even if it is unused.
    ratio = jnp.where(known > 0, now.total / jnp.where(known > 0, median, 1), 1)
    bad = (now.hit > 0) | ((known >= _KNOWN) & (ratio > xla.like(limit, ratio)))
    step = jnp.asarray(optax.safe_increment(old.total_steps))
    return old._replace(
        total_steps=step,
        total_norm=now.total,
        median_ratio=ratio,
        nonfinite=update_nonfinite(old.nonfinite, now, step),
        bad=update_episodes(old.bad, bad, step, now, ratio, tag),
    )


def _as_tag(tag: Any) -> jax.Array:
    """Converts a tag to int32; None becomes -1.

    Raises:
      ValueError: if it is not one integer.
    """
    if tag is None:
        return jnp.int32(-1)
    known = isinstance(tag, int | np.generic | np.ndarray | jax.Array)
    if not known or jnp.ndim(tag) or not jnp.issubdtype(jnp.result_type(tag), jnp.integer):
        raise validate.fail(
            "tag must be one integer, such as the number of the batch", tag, call="watch"
        )
    return jnp.asarray(tag).astype(jnp.int32)
