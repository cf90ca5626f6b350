"""Finds clips that act always, never, or in the wrong place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_number, format_share
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.recorded import RecordedRun


def clipping(run: RecordedRun) -> Iterator[Sign]:
    """Finds clips with a bound that act on nearly every step, or on none."""
    for head, clip in run.measuring_clips().items():
        known = np.isfinite(clip["grad_norm"]) & np.isfinite(clip["bound"])
        norms, bounds, share = (clip[field][known] for field in ("grad_norm", "bound", "clipped"))
        if len(norms) < limits.ENOUGH:
            continue
        # A run of zero norms has nothing to clip, and does not show that the bound is too far.
        usual = {"norm": float(np.median(norms)), "bound": float(np.median(bounds))}
        # For a clip by block this is the share of blocks: it is always active if all of them are.
        evidence = {"share": float(np.mean(share)), "steps": len(norms)} | usual
        # A bound of 0 may be intended.
        nearest = float(np.max(norms / np.maximum(bounds, 1e-30)))
        name = head.rstrip("/") or "the clip"
        # Before a record that begins late the clip may have been active.
        enough = len(norms) >= limits.ENOUGH_FOR_TAILS and not run.begins_late
        if evidence["share"] >= limits.ALWAYS:
            yield _always(name, evidence)
        elif enough and not share.any() and 0 < nearest < limits.RESERVE:
            yield _never(name, evidence | {"nearest": nearest})


def _always(name: str, evidence: dict[str, float]) -> Sign:
    return Sign(
        "clip-always-active",
        f"{name} is active on {format_share(evidence['share'])} of steps: the norm is typically"
        f" {format_number(evidence['norm'])}, the bound {format_number(evidence['bound'])}. After"
        " the clip the norm is always the bound.",
        evidence,
        "a bound near the usual norm, or one that follows it: optaxclip.quantile_clip(0.9),"
        f" zclip(max_norm={format_number(10 * evidence['norm'])}). With Adam little else changes.",
    )


def _never(name: str, evidence: dict[str, float]) -> Sign:
    nearest = evidence["nearest"]
    return Sign(
        "clip-never-active",
        f"{name} was not active on any of {evidence['steps']} steps: the largest norm was"
        f" {format_share(nearest)} of the bound. A spike {format_number(1 / nearest)} times as"
        " large would pass unclipped.",
        evidence,
        "a bound of a few times the usual norm, or one that follows it: optaxclip.quantile_clip(),"
        f" zclip(max_norm={format_number(evidence['bound'])}).",
    )


def averaging(run: RecordedRun) -> Iterator[Sign]:
    """Finds a clip that saw the norm of one device or microbatch, not of the mean as recorded."""
    # A `grad_norm` next to a `bound` belongs to a clip with an empty prefix.
    own = run.table.get("grad_norm") if "bound" not in run.table else None
    if own is None:
        return
    for head, clip in run.measuring_clips().items():
        known = np.isfinite(clip["grad_norm"]) & np.isfinite(own) & (own > 0)
        ratios = clip["grad_norm"][known] / own[known]
        larger = np.mean(ratios >= limits.BEFORE_MEAN) if len(ratios) >= limits.ENOUGH else 0
        if larger >= limits.ALWAYS:
            usual = float(np.median(ratios))
            yield Sign(
                "clip-before-averaging",
                f"{head.rstrip('/') or 'the clip'} saw norms {format_number(usual)} times those"
                " recorded as grad_norm on every step: it clips before gradients are averaged over"
                " devices or microbatches.",
                {"ratio": usual, "devices": usual**2, "steps": len(ratios)},
                "average first (lax.pmean), or pass the clip axis_names=; with optax.MultiSteps put"
                " the clip inside it.",
            )
