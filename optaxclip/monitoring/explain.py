"""Says in words what happened at the last step, read on the host from any optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from optaxclip.base import Metrics
from optaxclip.monitoring import words
from optaxclip.monitoring.bad import check_one_run
from optaxclip.monitoring.findings import Report
from optaxclip.monitoring.reading import check_is_state, find_parts, total_steps
from optaxclip.monitoring.state import WatchState, read_numbers
from optaxclip.states import kind_of
from optaxclip.wrappers.loss_scale import LossScaleState
from optaxclip.wrappers.steps import SkipState


def explain(opt_state: Any, params: Any = None) -> str:
    """Says in words what clips, watches and skip wrappers saw and did at the last step.

    A clip alone knows its norm, bound and counts. An `optaxclip.watch` before it adds how unusual
    the norm is, which block holds most of it, which block was the first that was not finite, and
    which steps went wrong.

    Args:
      opt_state: the state of an optimizer, or any tree that holds one; on the host, between steps.
      params: the parameters; if given, it adds their norm and which of them are not finite.

    Returns:
      Text with one fact per line; in a notebook a list. Steps are counted from 1, shares are of the
      squared norm, and clips are numbered as in `optaxclip.metrics`.

    Raises:
      ValueError: for the states of several runs at once (`vmap`), or anything that cannot be a
        state.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> grads = {"w": jnp.array([30.0, 40.0])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> print(optaxclip.explain(state, params=grads))
    step 1: norm 50; clipped to 1.0 (1 of 1 steps)
    parameters: norm 50
    """
    check_is_state(opt_state, "explain")
    parts = find_parts(opt_state)
    scales = [part for part in parts if isinstance(part, LossScaleState)]
    parts = [part for part in parts if not isinstance(part, LossScaleState)]
    for part in parts:
        check_one_run(total_steps(part))
    if not parts:
        nothing = "nothing to explain: no clip, watch or skip wrapper of optaxclip in"
        lines = [f"{nothing} {kind_of(opt_state)}", *words.describe_params(params)]
        return Report("\n".join(lines))
    # A watch and the clip after it share one line if both saw the same norm.
    partners = [_watch_before(parts, i) for i in range(len(parts))]
    watches = [part for part in parts if isinstance(part, WatchState)]
    lines = []
    for label, part, partner in zip(_labels(parts), parts, partners, strict=True):
        if not any(part is other for other in partners):  # else it is on the clip's line
            lines.append(label + _describe_part(part, partner))
    history = [line for w in watches for line in words.describe_history(w)]
    lines += [f"loss scale {float(s.loss_scale):g}" for s in scales]
    return Report("\n".join([*lines, *history, *words.describe_params(params)]))


def _labels(parts: list) -> list[str]:
    """Returns the start of each part's line: its number, if there are several of its kind."""
    labels = []
    for i, part in enumerate(parts):
        alike = [j for j, other in enumerate(parts) if type(other) is type(part)]
        kind = {Metrics: "clip", SkipState: "skip"}.get(type(part))
        labels.append(f"{kind}/{alike.index(i)}: " if kind and len(alike) > 1 else "")
    return labels


def _watch_before(parts: list, i: int) -> WatchState | None:
    """Returns the nearest watch before a clip or wrapper if both saw the same norm at one step."""
    before = [part for part in parts[:i] if isinstance(part, WatchState)]
    part = parts[i]
    seen = part.spike.metrics if isinstance(part, SkipState) else part
    if not before or isinstance(part, WatchState) or seen.grad_norm is None:
        return None
    # A clip inside a skip wrapper may have seen fewer steps than a watch outside it.
    watched = jax.device_get(read_numbers(before[-1]))
    if int(watched.total_steps) != int(seen.total_steps):
        return None
    norms = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(seen.grad_norm)]
    norm = float(np.linalg.norm(np.concatenate(norms))) if norms else 0.0
    total = float(watched.total_norm)
    same = np.isclose(norm, total, rtol=1e-3) or not (np.isfinite(norm) or np.isfinite(total))
    return before[-1] if same else None


def _describe_part(part: Any, partner: WatchState | None) -> str:
    """Describes a clip, watch or skip wrapper in one line, with what the watch before it knows."""
    steps = int(total_steps(part))
    if isinstance(part, WatchState):
        return f"step {steps}: {words.describe_watched_norm(part)}"
    if not steps:
        return "no step yet"
    seen = part.spike.metrics if isinstance(part, SkipState) else part
    what = words.describe_norm(seen) if partner is None else words.describe_watched_norm(partner)
    action = words.describe_skip(part) if isinstance(part, SkipState) else words.describe_clip(part)
    return f"step {steps}: {'; '.join(filter(None, (what, action)))}"
