"""One rule for each sign: what a recorded run shows, the numbers, and what to try.

Each rule asks for an effect far beyond what a healthy run shows (a factor of 10 or 100, and a good
fit), so that there are few false alarms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring.findings import format_number, format_share
from optaxclip.monitoring.fits import compare_halves, fit_growth, keep_positive
from optaxclip.monitoring.history import RecordedRun

Found = Iterator[tuple[str, str, dict[str, float], str]]

# With fewer steps a fit of noise alone reaches the limits below now and then.
_ENOUGH = 20


def _nonfinite(run: RecordedRun) -> Found:
    for name, x in (("norm", run.norms), ("loss", run.losses)):
        bad = np.flatnonzero(~np.isfinite(x)) if x is not None else []
        if x is not None and len(bad):
            yield (
                f"{name}-not-finite",
                f"the {name} is NaN or infinite on {len(bad)} of {len(x)} steps, first at step"
                f" {bad[0] + 1}.",
                {"steps": len(bad), "share": len(bad) / len(x), "first": int(bad[0])},
                "optaxclip.skip_nonfinite(optimizer), so that such a step changes nothing; with"
                " optaxclip.watch() in the"
                " chain, optaxclip.explain names the first such block and the batch (tag=): look"
                " there for logarithms,"
                " roots and divisions at 0, and for exponentials in half precision.",
            )


def _exploding(run: RecordedRun) -> Found:
    x = keep_positive(run.norms)
    # The last half, quarter, ...: an explosion is short beside the healthy run before it.
    sizes = [len(x) >> halvings for halvings in range(12) if len(x) >> halvings >= 8]
    fits = [
        fit
        for fit in (fit_growth(x[-size:]) for size in sizes)
        if fit.growth >= 10 and fit.r2 >= 0.85
    ]
    if fits:
        fit = max(fits, key=lambda fit: fit.r2)
        double = fit.evidence()["doubling_steps"]
        yield (
            "norms-exploding",
            f"the norm grows exponentially, {format_number(fit.growth)}-fold over the last"
            f" {fit.steps} steps: it doubles every"
            f" {format_number(double)} steps.",
            fit.evidence(),
            "a lower learning rate or a longer warm-up; a clip at the usual norm from before"
            " (optaxclip.zclip() finds it);"
            " in a recurrent network orthogonal initialization, or shorter sequences.",
        )


def _loss(run: RecordedRun) -> Found:
    x = run.losses[np.isfinite(run.losses)] if run.losses is not None else np.zeros(0)
    if len(x) < 2 * _ENOUGH:
        return
    before, after, error = compare_halves(x)
    change = (after - before) / max(abs(before), 1e-30)
    evidence = {"before": before, "after": after, "change": change, "standard_error": error}
    if abs(change) < 0.02 and abs(after - before) <= 2 * error:
        yield (
            "loss-not-moving",
            f"the loss is {format_number(before)} in the first half of the run and"
            f" {format_number(after)} in the second: the"
            " difference is within its noise.",
            evidence,
            "if it has not converged: a higher learning rate, or a higher bound if the clip is"
            " always active; check for"
            " vanishing norms, saturated units, and parameters that get no gradient.",
        )
    if change > 0.1 and after - before > 4 * error:
        yield (
            "loss-rising",
            f"the loss rises from {format_number(before)} to {format_number(after)}, the medians of"
            " the two halves of the run.",
            evidence,
            "a lower learning rate; going back to an earlier checkpoint, with"
            " optaxclip.skip_spikes(optimizer).",
        )


def _vanishing(run: RecordedRun) -> Found:
    x = keep_positive(run.norms)
    if len(x) < _ENOUGH:
        return
    fit, least = fit_growth(x), 1e-4
    if run.losses is not None and np.isfinite(run.losses).any():
        before, after, error = compare_halves(run.losses[np.isfinite(run.losses)])
        # Where the loss falls, so may the norms.
        least = 1e-2 if before - after <= 2 * error else 0.0
    if fit.growth <= least and fit.r2 >= 0.85:
        yield (
            "norms-vanishing",
            f"the norm falls exponentially, to {fit.growth:.1g} of its value {fit.steps} steps"
            " earlier.",
            {"growth": fit.growth, "r2": fit.r2, "steps": fit.steps},
            "normalization layers, residual connections, activations that do not saturate; in"
            " float16, loss scaling.",
        )


def _params(run: RecordedRun) -> Found:
    x = keep_positive(run.param_norms) if run.param_norms is not None else np.zeros(0)
    if len(x) < _ENOUGH:
        return
    fit, late = fit_growth(x), x[-1] / x[len(x) // 2]
    if fit.growth >= 3 and fit.r2 >= 0.8 and late >= 1.3:
        yield (
            "weights-growing",
            f"the norm of the parameters grows {format_number(fit.growth)}-fold over {fit.steps}"
            f" steps, {format_number(late)}-fold in"
            " the second half.",
            fit.evidence(),
            "weight decay (optax.adamw), a lower learning rate, normalization of activations or"
            " logits.",
        )


def _series(blocks: dict[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """The norms of numbered layers: by the name before the number, then by the number."""
    squares: dict[str, dict[int, np.ndarray]] = {}
    for name, x in blocks.items():
        # Every number in a path may be the one that counts layers: each is tried.
        for match in re.finditer(r"\d+", name):
            layers = squares.setdefault(name[: match.start()], {})
            layers[int(match[0])] = layers.get(int(match[0]), np.zeros(len(x))) + np.square(x)
    return {
        head: {n: np.sqrt(x) for n, x in sorted(layers.items())} for head, layers in squares.items()
    }


def _depth(run: RecordedRun) -> Found:
    for head, layers in _series(run.blocks).items():
        usual = {n: np.median(x[np.isfinite(x)]) for n, x in layers.items() if np.isfinite(x).any()}
        norms = np.array([x for x in usual.values() if x > 0])
        if len(norms) < 4:
            continue
        fit = fit_growth(norms)
        if max(fit.growth, 1 / fit.growth) >= 100 and fit.r2 >= 0.85:
            vanishes, ratio = fit.growth > 1, max(fit.growth, 1 / fit.growth)
            per_layer = ratio ** (1 / (len(norms) - 1))
            yield (
                "norms-fall-with-depth" if vanishes else "norms-grow-with-depth",
                f"from {head}{max(usual)} back to {head}{min(usual)} the norm"
                f" {'falls' if vanishes else 'grows'}"
                f" {format_number(ratio)}-fold, by {format_number(per_layer)} a layer.",
                {"ratio": ratio, "per_layer": per_layer, "r2": fit.r2, "layers": len(norms)},
                "residual connections, normalization layers, an initialization that keeps the scale"
                " (He, orthogonal);"
                " meanwhile optaxclip.clip_by_leaf_norm or larc, which give each layer a bound of"
                " its own.",
            )


def _bounded(run: RecordedRun) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """For each clip with bounds its name, the norms over the bounds, and the numbers."""
    for head, clip in run.clips.items():
        fine = np.isfinite(clip["grad_norm"]) & np.isfinite(clip["bound"])
        norms, bounds, share = (clip[field][fine] for field in ("grad_norm", "bound", "clipped"))
        if len(norms) >= _ENOUGH:
            usual = {"norm": float(np.median(norms)), "bound": float(np.median(bounds))}
            evidence = {"share": float(np.mean(share > 0)), "steps": len(norms)} | usual
            yield head.rstrip("/") or "the clip", norms / np.maximum(bounds, 1e-30), evidence


def _clip_always(run: RecordedRun) -> Found:
    for name, _, evidence in _bounded(run):
        if evidence["share"] >= 0.95:
            yield (
                "clip-always-active",
                f"{name} is active on {format_share(evidence['share'])} of steps: the norm is"
                " typically"
                f" {format_number(evidence['norm'])}, the bound {format_number(evidence['bound'])}."
                " The norm after the"
                " clip is always the bound.",
                evidence,
                "a bound near the usual norm, or one that follows it: optaxclip.zclip(),"
                " quantile_clip(0.9).",
            )


def _clip_never(run: RecordedRun) -> Found:
    for name, ratios, evidence in _bounded(run):
        nearest = float(np.max(ratios))
        if not evidence["share"] and nearest < 0.2 and len(ratios) >= 100:
            yield (
                "clip-never-active",
                f"{name} was not active on any of {len(ratios)} steps: the largest norm was"
                f" {format_share(nearest)} of the"
                f" bound. A spike {format_number(1 / max(nearest, 1e-30))} times as large would"
                " pass unclipped.",
                evidence | {"nearest": nearest},
                "a bound of a few times the usual norm, or one that follows it: optaxclip.zclip(),"
                " quantile_clip().",
            )


def _heavy_tail(run: RecordedRun) -> Found:
    x = keep_positive(run.norms)
    if len(x) < 100:
        return
    # Over the running median, so that a drift of all norms is not taken for a tail.
    usual = np.array([np.median(x[max(i - 25, 0) : i + 26]) for i in range(len(x))])
    ratio = np.sort(x / usual)
    top = ratio[-len(ratio) // 10 :]
    index = 1 / max(float(np.mean(np.log(top / top[0]))), 1e-30)
    high = float(np.quantile(ratio, 0.99))
    if index < 2 and high >= 4:
        yield (
            "heavy-tail",
            f"1 % of the norms are over {format_number(high)} times the median around them, the"
            f" largest {format_number(ratio[-1])}"
            f" times; with a tail index of {format_number(index)} their variance is not finite.",
            {"tail_index": index, "quantile_99": high, "largest": float(ratio[-1])},
            "a clip: without one a few steps decide where the run goes: quantile_clip(0.9) or"
            " zclip(); a larger batch.",
        )


RULES = (
    _nonfinite,
    _exploding,
    _vanishing,
    _depth,
    _loss,
    _params,
    _clip_always,
    _clip_never,
    _heavy_tail,
)
