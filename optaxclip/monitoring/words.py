"""Writes sentences about what clips, watches and skip wrappers did at the last step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from optaxclip.base import Metrics
from optaxclip.monitoring.bad import read_episodes
from optaxclip.monitoring.display import format_number, format_share
from optaxclip.monitoring.reading import total_steps
from optaxclip.monitoring.state import WatchState, read_numbers, read_quantiles, read_top
from optaxclip.record import scalars_of
from optaxclip.trees import select, unpack_names
from optaxclip.wrappers.steps import LOSS, NORM, SkipState


def describe_watched_norm(w: WatchState) -> str:
    """Says how unusual the norm of the last step is, and where most of it is."""
    seen = jax.device_get(read_numbers(w))
    top, share = jax.device_get(read_top(w, seen))
    names = _display_names(w.blocks)
    if not seen.total_steps:
        return "no step seen yet"
    if seen.nonfinite.at_step == seen.total_steps:
        first, last = names[seen.nonfinite.first], names[seen.nonfinite.last]
        if len(names) == 1:
            return "not finite"
        if seen.nonfinite.blocks_hit == len(names):
            either = f"either the loss is not finite, or {last}, the last of them"
            return f"not finite in all {len(names)} blocks: {either}"
        more = "" if first == last else f", last in {last}, whose gradient was computed first"
        count = f"{int(seen.nonfinite.blocks_hit)} of {len(names)} blocks"
        return f"not finite in {count}, first in {first}{more}"
    # A zero norm would look like any small norm, and its shares and ratio mean nothing.
    if len(names) and seen.total_norm == 0:
        return "all gradients are zero"
    usual = "" if seen.trackers.seen < 2 else f" = {format_number(seen.median_ratio)} x the median"
    where = ""
    if len(names) > 1 and seen.total_norm > 0:
        where = f"; {format_share(share[0])} of it in {names[top[0]]}"
    return f"norm {format_number(seen.total_norm)}{usual}{where}"


def describe_history(w: WatchState) -> list[str]:
    """Says what a watch knows about the steps before, one fact per line."""
    episodes = read_episodes(w)
    lines = [f"bad: {bad}" for bad in episodes]
    seen = jax.device_get(read_numbers(w))
    quantiles = jax.device_get(read_quantiles(w, seen))
    order = episodes[-1].order() if episodes else {}
    # Blocks that broke at the same step have no order.
    if len(set(order.values())) > 1:
        first = ", ".join(f"{block} at step {step}" for block, step in list(order.items())[:3])
        lines.append(f"broke first: {first}")
    if seen.trackers.seen < 10:
        return lines
    levels, candidates = unpack_names(w.quantiles), unpack_names(w.candidates)
    known = [(100 * float(q), x) for q, x in zip(levels, quantiles, strict=True) if x > 0]
    if known:
        below = ", ".join(f"{q:g} % below {format_number(x)}" for q, x in known)
        lines.append(f"recent norms: {below}")
    if candidates:
        pairs = zip(candidates, seen.would_clip / seen.total_steps, strict=True)
        tried = ", ".join(f"{format_share(rate)} at {name}" for name, rate in pairs)
        lines.append(f"would have clipped of {int(seen.total_steps)} steps: {tried}")
    return lines


def _display_names(blocks: Any) -> tuple[str, ...]:
    """Returns the names of blocks, with a readable name for a top-level array."""
    return tuple(name or "the top level" for name in unpack_names(blocks))


def describe_norm(m: Metrics) -> str:
    """Says what a clip alone knows about the norm."""
    if m.grad_norm is None:
        return ""
    seen, names = scalars_of(m, ""), _display_names(m.blocks)
    norm = float(seen.get("grad_norm", 0.0))
    if not np.isfinite(norm) and len(names) > 1:
        bad = [names[i] for i in np.flatnonzero(~np.isfinite(m.grad_norm))]
        return f"the norm is not finite in {len(bad)} of {len(names)} blocks, first in {bad[0]}"
    if not np.isfinite(norm):
        return "the norm is not finite"
    if "grad_norm" in seen and norm == 0:
        return "all gradients are zero"
    if len(names) < 2:
        return f"norm {format_number(norm)}"
    where = names[int(np.argmax(m.grad_norm))]
    return f"norm {format_number(norm)} in {where}, the largest of {len(names)}"


def describe_clip(m: Metrics) -> str:
    """Says what a clip did, and how often."""
    seen = {key: float(x) for key, x in scalars_of(m, "").items()}
    if m.grad_norm is None:
        bound = f"bound {format_number(seen['bound'])}; " if "bound" in seen else ""
        return f"{bound}it does not measure what it clips (see its argument measure=)"
    if "grad_norm" not in seen:
        return "no block to clip"
    often, bad = _largest(m.clipped_steps), _largest(m.nonfinite_steps)
    counts = f"{often} of {int(m.total_steps)} steps{f', {bad} not finite' if bad else ''}"
    names = _display_names(m.blocks)
    action = _describe_blocks(m, names) if len(names) > 1 else _describe_block(seen)
    return f"{action} ({counts})"


def _largest(counts: Any) -> int:
    return max((int(np.max(x, initial=0)) for x in jax.tree.leaves(counts)), default=0)


def _describe_blocks(m: Metrics, names: tuple[str, ...]) -> str:
    """Says what a clip did to named blocks."""
    norms, factors = np.asarray(m.grad_norm), np.asarray(m.clip_factor)
    over = np.flatnonzero(np.isfinite(norms) & (np.asarray(m.clipped_share) > 0))
    if not len(over):
        return "nothing clipped"
    most = over[np.argmin(factors[over])]
    to = format_number(norms[most] * factors[most])
    return f"{len(over)} of {len(names)} blocks clipped, most {names[most]}, to {to}"


def _describe_block(seen: dict[str, float]) -> str:
    """Says what a clip did to one block, or to all units or elements together."""
    norm, factor, share = (seen[key] for key in ("grad_norm", "factor", "clipped"))
    bound = seen.get("bound", np.inf)
    if not np.isfinite(norm):
        return "set to zero" if factor == 0 else "set to NaN"
    if 0 < share < 1:
        lowest = f"the lowest bound {format_number(bound)}"
        return f"{format_share(share)} of units or elements clipped, {lowest}"
    if share:
        return f"clipped to {format_number(norm * factor)}"
    if factor == 1:
        return f"not clipped: {'no bound' if np.isinf(bound) else f'within {format_number(bound)}'}"
    return f"scaled to {format_number(norm * factor)}"


def describe_skip(s: SkipState) -> str:
    """Says whether a wrapper skipped the step, why, and how often."""
    m, skipped, total = s.spike.metrics, int(s.skipped_steps), int(total_steps(s))
    nothing = ": no update has been applied yet" if skipped == total > 1 else ""
    counts = f"{skipped} of {total} steps skipped"
    if not s.consecutive_skips:
        return f"step taken ({counts})"
    reasons = {NORM: f", over {format_number(m.clip_bound)}", LOSS: " because of its loss"}
    # For a step that was not finite: a norm that is not has been mentioned already.
    lost = "" if not np.isfinite(m.grad_norm) else ": the loss is not finite"
    reason = reasons.get(int(s.last_reason), lost)
    return f"step skipped{reason} ({counts}, {int(s.consecutive_skips)} consecutive){nothing}"


def describe_params(params: Any) -> list[str]:
    """Says in one line whether the parameters are finite, or their norm, if there are any."""
    # Complex double precision on the host does not overflow, whatever the dtype of a leaf.
    leaves = select(params)
    if not leaves.arrays:
        return []
    norms = [
        float(np.linalg.norm(np.ravel(np.asarray(jax.device_get(x), np.complex128))))
        for x in leaves.arrays
    ]
    bad = [path for path, norm in zip(leaves.paths, norms, strict=True) if not np.isfinite(norm)]
    if not bad:
        return [f"parameters: norm {format_number(float(np.linalg.norm(norms)))}"]
    where = f" in {len(bad)} of {len(norms)} leaves, first in {bad[0]}" if len(norms) > 1 else ""
    return [f"parameters: not finite{where}: go back to a checkpoint"]
