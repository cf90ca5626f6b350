"""Reads clips, watches and skip wrappers out of any optimizer's state, as scalars."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import validate
from optaxclip.base import Metrics
from optaxclip.monitoring.state import WatchState, read_numbers, watch_scalars
from optaxclip.record import find_nodes, number_keys, scalars_of
from optaxclip.states import kind_of
from optaxclip.trees import unpack_names
from optaxclip.wrappers.loss_scale import LossScaleState
from optaxclip.wrappers.steps import SkipState


def metrics(
    opt_state: Any, prefix: str = "clip/", watch_prefix: str = "watch/", skip_prefix: str = "skip/"
) -> dict[str, jax.Array]:
    """Returns what clips, watches and skip wrappers did at the last step, as a flat dict to log.

    It finds every clip, however deep: in `optax.chain`, `masked`, `partition`, `MultiSteps`,
    `inject_hyperparams`, `apply_if_finite`, a Flax `nnx.Optimizer` (pass `optimizer.opt_state`) or
    a linen `TrainState`. It is safe under `jit`, `scan` and `vmap`. Nothing is copied to the host
    until you look, so log every few steps, not every one. For a batch of runs (`vmap`) each value
    has the batch's shape.

    Args:
      opt_state: the state of an optimizer, or any tree that holds one.
      prefix: the start of all keys of clips.
      watch_prefix: the start of all keys of `optaxclip.watch`.
      skip_prefix: the start of all keys of `skip_spikes` and `skip_nonfinite`.

    Returns:
      A dict, empty for a state without a clip. With two or more clips (watches, wrappers), their
      keys start with `clip/0/`, `clip/1/`, in the order of the state.

      For a clip:

      - `grad_norm` (before the clip), `bound`, `factor`, `nonfinite_steps` and `steps`;
      - `clipped`: 1 if clipped at this step, else 0; with many blocks, the share of them;
      - `clipped_fraction`: the share of all steps that were clipped;
      - with several blocks or units, these are the largest norm, the smallest bound and factor, the
        mean shares and the largest count; if the blocks have names, each key except `steps` appears
        again as `grad_norm/<block>`, and so on;
      - a clip that does not measure has only `bound` and `steps`.

      For a watch:

      - `grad_norm`, `grad_norm/<block>`, `median_ratio`, `quantile/0.5`, `would_clip/<candidate>`,
        `steps`;
      - `top_block/0` (the number of a block, in tree order), `top_share/0`, and so on;
      - `nonfinite_steps`, and for the last of them `nonfinite_step` and `nonfinite_block`;
        `bad_steps`.

      For a skip wrapper: `steps` (skipped), `fraction` (of all steps), `consecutive` (skips up to
        now), `last_reason` (why the last one was skipped: 1 its norm, 2 its loss, 3 not finite; 0
        for none), and what its own test saw, `grad_norm` and `bound`. That test is not numbered as
        a clip, so wrapping a chain does not change the keys of its clips.

      For `dynamic_loss_scale`: `loss_scale`.

    Raises:
      ValueError: for an optimizer instead of its state, or anything that cannot be a state, such as
        parameters.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> seen = optaxclip.metrics(state)
    >>> float(seen["clip/grad_norm"]), float(seen["clip/bound"]), float(seen["clip/clipped"])
    (5.0, 1.0, 1.0)
    """
    check_is_state(opt_state, "metrics")
    parts = find_parts(opt_state)
    # One search for all kinds, which passes over the clip that a skip wrapper measures with.
    kinds = ((Metrics, scalars_of, prefix), (WatchState, watch_scalars, watch_prefix))
    kinds = (*kinds, (SkipState, _skip_scalars, skip_prefix), (LossScaleState, _scale_scalars, ""))
    found = [
        number_keys([x for x in parts if isinstance(x, kind)], read, start)
        for kind, read, start in kinds
    ]
    return {key: x for scalars in found for key, x in scalars.items()}


def find_parts(opt_state: Any) -> list[Any]:
    """Finds what `metrics` reads in a state, in order: `Metrics` of clips, and states of others.

    A wrapper comes before its inside. A skip wrapper measures with a clip of its own, which clips
    nothing, so only the inside of the wrapper is searched.
    """
    parts, wrappers = [], (SkipState, LossScaleState)
    for part in find_nodes(opt_state, Metrics, WatchState, *wrappers):
        parts += [part, *find_parts(part.inner)] if isinstance(part, wrappers) else [part]
    return parts


def count_blocks(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the histograms of all watches by block, numbered if several watches have them."""
    found = [x for x in find_parts(opt_state) if isinstance(x, WatchState)]
    found = [x for x in found if x.histogram is not None]

    def read(w, prefix):
        return {prefix + n: w.histogram[..., i, :] for i, n in enumerate(unpack_names(w.blocks))}

    return number_keys(found, read, "")


def _skip_scalars(s: SkipState, prefix: str) -> dict[str, jax.Array]:
    total, test = total_steps(s), s.spike.metrics
    out = {
        "steps": s.skipped_steps,
        "fraction": s.skipped_steps / jnp.maximum(total, 1),
        "consecutive": s.consecutive_skips,
        "last_reason": s.last_reason,
        "grad_norm": test.grad_norm,
        "bound": test.clip_bound,
    }
    return {prefix + key: x for key, x in out.items()}


def _scale_scalars(s: LossScaleState, prefix: str) -> dict[str, jax.Array]:
    return {prefix + "loss_scale": s.loss_scale}


def total_steps(part: Any) -> jax.Array:
    """Returns how many steps a clip, watch or skip wrapper has seen."""
    if isinstance(part, WatchState):
        return read_numbers(part).total_steps
    return part.spike.metrics.total_steps if isinstance(part, SkipState) else part.total_steps


def check_is_state(opt_state: Any, call: str) -> None:
    """Raises ValueError for anything that cannot hold the state of an optimizer."""
    nodes = jax.tree.leaves(opt_state, is_leaf=validate.is_transformation)
    # An optimizer next to its state is allowed, because a trainer may hold both.
    if any(map(validate.is_transformation, nodes)) and not find_parts(opt_state):
        raise ValueError(
            f"{call}: this is an optimizer, but what it did is recorded in its state: write state ="
            " tx.init(params),"
            f" updates, state = tx.update(grads, state, params), and {call}(state)."
        )
    hidden = sorted({type(x).__name__ for x in nodes if _is_hidden(x)})
    if hidden and jax.tree.structure(opt_state).num_nodes > 1 and not find_parts(opt_state):
        raise ValueError(
            f"{call}: no clip, watch or skip wrapper was found in this {kind_of(opt_state)}, and"
            f" the search with jax.tree does not look into {', '.join(hidden)}: pass the state that"
            " is inside."
        )
    if not _may_be_state(opt_state):
        raise ValueError(
            f"{call}: opt_state must be the state of an optimizer, got {_describe(opt_state)}: pass"
            " what tx.init and tx.update return, a train state that holds it, or"
            " optimizer.opt_state of a flax.nnx.Optimizer. (A checkpoint restored without a"
            " template contains only dicts of arrays.)"
        )


def _may_be_state(tree: Any) -> bool:
    """Whether there is any node other than dicts and lists, which parameters are made of."""

    # A user's state may be a dataclass, so every other kind of node passes.
    def is_other(x):
        return isinstance(x, tuple) or not (
            x is None or isinstance(x, Mapping | list) or jax.tree_util.all_leaves([x])
        )

    return any(is_other(x) for x in jax.tree.leaves(tree, is_leaf=is_other))


def _is_hidden(x: Any) -> bool:
    """Whether a leaf is an object that may hold anything."""
    known = isinstance(x, str | bytes | numbers.Number) or callable(x)
    return not (known or hasattr(x, "dtype") or validate.is_transformation(x))


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping | list):
        return f"a {kind_of(tree)} with {len(jax.tree.leaves(tree))} leaves"
    return "an array" if isinstance(tree, jax.Array) else repr(tree)
