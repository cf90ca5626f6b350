"""What happened at the last step, in words, out of any optimizer's state. All of it on the host."""

from typing import Any

import jax
import numpy as np

from optaxclip.record import Metrics, found_in
from optaxclip.watching.bad import check_alone
from optaxclip.watching.state import WatchState
from optaxclip.watching.words import clipped, history, norm_of, of_params, record_of, skipped, watched
from optaxclip.wrappers import SkipState


def explain(opt_state: Any, params: Any = None) -> str:
    """Says in words what clips, watches and skipping wrappers saw and did at the last step.

    A clip alone knows its norm, bound and counts. With `optaxclip.watch` before it, it is also said how unusual the
    norm is, which block most of it is in, which was the first that was not finite, and which steps went wrong.

    Args:
      opt_state: the state of an optimizer, or anything that holds one; on the host, between steps.
      params: the parameters; if given, their norm is said, and which of them are not finite.

    Returns:
      Text, one line a fact. Steps are counted from 1, shares are of the squared norm, clips are numbered as in
      `optaxclip.metrics`.

    Raises:
      ValueError: for the states of several runs at once (`vmap`): pick one.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> grads = {"w": jnp.array([30.0, 40.0])}
    >>> _, state = tx.update(grads, tx.init(grads))
    >>> print(optaxclip.explain(state, params=grads))
    step 1: norm 50; clipped to 1.0 (1 of 1 steps)
    parameters: norm 50
    """
    parts = _parts(opt_state)
    numbers = {i: n for n, i in enumerate(i for i, part in enumerate(parts) if not isinstance(part, WatchState))}
    partners = {i: _watch_of(parts, i) for i in numbers}
    lines = []
    for i, part in enumerate(parts):
        if i in numbers:
            label = f"clip/{numbers[i]}: " if len(numbers) > 1 else ""
            lines.append(label + _line(part, partners[i]))
        elif not any(part is partner for partner in partners.values()):
            lines.append(f"step {int(part.total_steps)}: {watched(part)}")
    lines += [line for part in parts if isinstance(part, WatchState) for line in history(part)]
    return "\n".join(lines + of_params(params))


def _parts(opt_state: Any) -> list:
    """The clips, watches and skipping wrappers of a state, on the host, in the order of `optaxclip.metrics`."""
    parts = []
    for part in found_in(opt_state, Metrics, WatchState, SkipState):
        inner = _parts(part.inner) if isinstance(part, SkipState) else []
        parts += [jax.device_get(part._replace(inner=()) if isinstance(part, SkipState) else part), *inner]
    for part in parts:
        check_alone(record_of(part).total_steps)
    return parts


def _watch_of(parts: list, clip: int) -> WatchState | None:
    """The nearest watch before a clip, if it saw the same norm at the same step."""
    before = [part for part in parts[:clip] if isinstance(part, WatchState)]
    seen = record_of(parts[clip])
    norm = np.sqrt(np.sum(np.square(np.asarray(seen.grad_norm, np.float64))))
    if not before or before[-1].total_steps != seen.total_steps:
        return None
    total = float(before[-1].total_norm)
    return before[-1] if np.isclose(norm, total, rtol=1e-3) or not np.isfinite([norm, total]).any() else None


def _line(part: Metrics | SkipState, watch: WatchState | None) -> str:
    """One line on a clip or a skipping wrapper, with what a watch knows of the step."""
    seen = record_of(part)
    what = norm_of(seen) if watch is None else watched(watch)
    deed = skipped(part) if isinstance(part, SkipState) else clipped(part)
    return f"step {int(seen.total_steps)}: {what}; {deed}" if seen.total_steps else "no step yet"
