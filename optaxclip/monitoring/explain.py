"""What happened at the last step, in words, out of any optimizer's state. All of it runs on the host."""

from typing import Any

import jax
import numpy as np

from optaxclip.base import Metrics
from optaxclip.monitoring.bad import check_one_run, read_ring
from optaxclip.monitoring.findings import format_number, format_share
from optaxclip.monitoring.reading import SkipState, check_is_state, find_parts, total_steps
from optaxclip.monitoring.state import WatchState
from optaxclip.record import scalars_of, unpack_names
from optaxclip.states import kind_of
from optaxclip.trees import select


def explain(opt_state: Any, params: Any = None) -> str:
    """Says in words what clips, watches and skip wrappers saw and did at the last step.

    A clip by itself knows its norm, bound and counts. An `optaxclip.watch` before it adds how unusual the norm is,
    which block most of it is in, which was the first that was not finite, and which steps went wrong.

    Args:
      opt_state: the state of an optimizer, or any tree that holds one; on the host, between steps.
      params: the parameters; if given, their norm is said, and which of them are not finite.

    Returns:
      Text, one line a fact. Steps are counted from 1, shares are of the squared norm, clips are numbered as in
      `optaxclip.metrics`.

    Raises:
      ValueError: for the states of several runs at once (`vmap`), and for what cannot be a state.

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
    for part in parts:
        check_one_run(total_steps(part))
    if not parts:
        nothing = f"nothing to explain: no clip, watch or skip wrapper of optaxclip in {kind_of(opt_state)}"
        return "\n".join([nothing, *_explain_params(params)])
    partners = [_watch_before(parts, i) for i in range(len(parts))]
    watches = [part for part in parts if isinstance(part, WatchState)]
    lines = []
    for label, part, partner in zip(_labels(parts), parts, partners, strict=True):
        if not any(part is other for other in partners):  # else its line is that of the clip
            lines.append(label + _explain_part(part, partner))
    return "\n".join([*lines, *(line for w in watches for line in _explain_history(w)), *_explain_params(params)])


def _labels(parts: list) -> list[str]:
    """What the line of each part starts with: its number, where there are several of its kind."""
    labels = []
    for i, part in enumerate(parts):
        alike = [j for j, other in enumerate(parts) if type(other) is type(part)]
        kind = {Metrics: "clip", SkipState: "skip"}.get(type(part))
        labels.append(f"{kind}/{alike.index(i)}: " if kind and len(alike) > 1 else "")
    return labels


def _watch_before(parts: list, i: int) -> WatchState | None:
    """The nearest watch before a clip or wrapper, if it saw the same norm at the same step."""
    before = [part for part in parts[:i] if isinstance(part, WatchState)]
    part = parts[i]
    seen = part.spike.metrics if isinstance(part, SkipState) else part
    if not before or isinstance(part, WatchState) or seen.grad_norm is None:
        return None
    if int(before[-1].total_steps) != int(seen.total_steps):
        return None
    norms = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(jax.device_get(seen.grad_norm))]
    norm, total = np.linalg.norm(np.concatenate(norms)) if norms else 0.0, float(before[-1].total_norm)
    return before[-1] if np.isclose(norm, total, rtol=1e-3) or not np.isfinite([norm, total]).any() else None


def _explain_part(part: Any, partner: WatchState | None) -> str:
    """One line on a clip, watch or skip wrapper, with what the watch before it knows of the step."""
    steps = int(total_steps(part))
    if isinstance(part, WatchState):
        return f"step {steps}: {_explain_norm_of_watch(part)}"
    if not steps:
        return "no step yet"
    seen = part.spike.metrics if isinstance(part, SkipState) else part
    what = _explain_norm(seen) if partner is None else _explain_norm_of_watch(partner)
    action = _explain_skip(part) if isinstance(part, SkipState) else _explain_clip(part)
    return f"step {steps}: {'; '.join(filter(None, (what, action)))}"


def _explain_norm_of_watch(w: WatchState) -> str:
    """How unusual the norm of the last step is, and where most of it is."""
    w, names = jax.device_get(w), display_names(w.blocks)
    if not w.total_steps:
        return "nothing seen yet"
    if w.nonfinite.at_step == w.total_steps:
        first, last = names[w.nonfinite.first], names[w.nonfinite.last]
        if len(names) == 1:
            return "not finite"
        if w.nonfinite.blocks_hit == len(names):
            return f"not finite in all {len(names)} blocks: either the loss is not finite, or {last}, the last of them"
        more = "" if first == last else f", last in {last}, whose gradient was computed first"
        return f"not finite in {int(w.nonfinite.blocks_hit)} of {len(names)} blocks, first in {first}{more}"
    usual = "" if w.trackers.seen < 2 else f" = {format_number(w.median_ratio)} x the median"
    where = ""
    if len(names) > 1 and w.total_norm > 0:
        where = f"; {format_share(w.top_shares[0])} of it in {names[w.top_blocks[0]]}"
    return f"norm {format_number(w.total_norm)}{usual}{where}"


def _explain_history(w: WatchState) -> list[str]:
    """What a watch knows of the steps before: one line each."""
    lines, w = [f"bad: {bad}" for bad in read_ring(w)], jax.device_get(w)
    if w.trackers.seen < 10:
        return lines
    levels, candidates = unpack_names(w.quantile_names), unpack_names(w.candidates)
    if levels:
        pairs = zip(levels, w.quantiles, strict=True)
        known = ", ".join(f"{100 * float(q):g} % below {format_number(x)}" for q, x in pairs)
        lines.append(f"recent norms: {known}")
    if candidates:
        pairs = zip(candidates, w.would_clip / w.total_steps, strict=True)
        tried = ", ".join(f"{format_share(rate)} at {name}" for name, rate in pairs)
        lines.append(f"would have clipped of {int(w.total_steps)} steps: {tried}")
    return lines


def display_names(blocks: Any) -> tuple[str, ...]:
    """The names of blocks; a top-level array has a name that one can read."""
    return tuple(name or "the top level" for name in unpack_names(blocks))


def _explain_norm(m: Metrics) -> str:
    """What a clip knows of the norm by itself."""
    if m.grad_norm is None:
        return ""
    norm, names = float(scalars_of(m, "").get("grad_norm", 0.0)), display_names(m.blocks)
    if not np.isfinite(norm):
        bad = [name for name, x in zip(names, np.ravel(m.grad_norm), strict=True) if not np.isfinite(x)] if names else []
        where = f" in {len(bad)} of {len(names)} blocks, first in {bad[0]}" if len(names) > 1 else ""
        return f"the norm is not finite{where}"
    if len(names) < 2:
        return f"norm {format_number(norm)}"
    return f"norm {format_number(norm)} in {names[int(np.argmax(m.grad_norm))]}, the largest of {len(names)}"


def _explain_clip(m: Metrics) -> str:
    """What a clip did, and how often."""
    seen = {key: float(x) for key, x in scalars_of(m, "").items()}
    if m.grad_norm is None:
        bound = f"bound {format_number(seen['bound'])}; " if "bound" in seen else ""
        return f"{bound}this clip does not measure, so how much it clipped is not known"
    if "grad_norm" not in seen:
        return "no block to clip"
    often, bad = _largest(m.clipped_steps), _largest(m.nonfinite_steps)
    counts = f"{often} of {int(m.total_steps)} steps{f', {bad} not finite' if bad else ''}"
    names = display_names(m.blocks)
    action = _explain_blocks(m, names) if len(names) > 1 else _explain_block(seen)
    return f"{action} ({counts})"


def _largest(counts: Any) -> int:
    return max((int(np.max(x, initial=0)) for x in jax.tree.leaves(counts)), default=0)


def _explain_blocks(m: Metrics, names: tuple[str, ...]) -> str:
    """What a clip did to named blocks."""
    over = np.flatnonzero(m.clipped_share)
    if not len(over):
        return "nothing clipped"
    norms, factors = np.asarray(m.grad_norm), np.asarray(m.clip_factor)
    most = over[np.argmin(factors[over])]
    to = format_number(norms[most] * factors[most])
    return f"{len(over)} of {len(names)} blocks clipped, most {names[most]}, to {to}"


def _explain_block(seen: dict[str, float]) -> str:
    """What a clip did to one block, or to all units or elements together."""
    norm, factor, share, bound = seen["grad_norm"], seen["factor"], seen["clipped"], seen.get("bound", np.inf)
    if not np.isfinite(norm):
        return "set to zero" if factor == 0 else "NaN now"
    if 0 < share < 1:
        return f"{format_share(share)} of units or elements clipped, the lowest bound {format_number(bound)}"
    if share:
        return f"clipped to {format_number(norm * factor)}"
    if factor == 1:
        return f"not clipped: {'no bound' if np.isinf(bound) else f'within {format_number(bound)}'}"
    return f"scaled to {format_number(norm * factor)}"


def _explain_skip(s: SkipState) -> str:
    """Whether a wrapper skipped the step, why, and how often."""
    m, skipped = s.spike.metrics, int(s.skipped_steps)
    counts = f"{skipped} of {int(total_steps(s))} steps skipped"
    if not s.consecutive_skips:
        return f"step taken ({counts})"
    over = f", over {format_number(m.clip_bound)}" if m.clipped_share else " for its loss"
    return f"step skipped{over if np.isfinite(m.grad_norm) else ''} ({counts}, {int(s.consecutive_skips)} consecutive)"


def _explain_params(params: Any) -> list[str]:
    """A line on the parameters, if there are any."""
    leaves = select(params)
    if not leaves.arrays:
        return []
    norms = [float(np.linalg.norm(np.ravel(np.asarray(jax.device_get(x), np.complex128)))) for x in leaves.arrays]
    bad = [path for path, norm in zip(leaves.paths, norms, strict=True) if not np.isfinite(norm)]
    if not bad:
        return [f"parameters: norm {format_number(float(np.linalg.norm(norms)))}"]
    where = f" in {len(bad)} of {len(norms)} leaves, first in {bad[0]}" if len(norms) > 1 else ""
    return [f"parameters: not finite{where}: go back to a checkpoint"]
