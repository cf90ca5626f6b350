"""One rule a sign: each a function of a recorded window that says what it sees, the numbers, and what to try.

Each rule asks for an effect that a healthy run does not have by far (a factor of 10 or 100, on top of a good fit), so
that silence is the rule.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from optaxclip.watching.bad import percent, short
from optaxclip.watching.window import Window

Found = Iterator[tuple[str, str, dict[str, float], str]]

_ENOUGH = 20  # steps


class _Fit(NamedTuple):
    """An exponential fit: how much it grows over the steps, and which part of the variance it explains."""

    growth: float
    r2: float
    steps: int

    def evidence(self) -> dict[str, float]:
        doubling = np.log(2) * (self.steps - 1) / np.log(self.growth)
        return {"growth": self.growth, "doubling_steps": doubling, "r2": self.r2, "steps": self.steps}


def _fit(x: np.ndarray) -> _Fit:
    y, t = np.log(x), np.arange(len(x)) - (len(x) - 1) / 2
    slope = np.dot(t, y) / np.dot(t, t)
    rest = y - y.mean() - slope * t
    whole = np.sum(np.square(y - y.mean()))
    return _Fit(
        float(np.exp(slope * (len(x) - 1))), float(1 - np.sum(np.square(rest)) / whole) if whole else 0.0, len(x)
    )


def _sound(x: np.ndarray) -> np.ndarray:
    """What is finite and positive up to the first step that is not finite, which is where a run ends."""
    bad = np.flatnonzero(~np.isfinite(x))
    x = x[: bad[0]] if len(bad) and bad[0] >= 8 else x[np.isfinite(x)]
    return x[x > 0]


def _not_finite(w: Window) -> Found:
    for name, x in (("norm", w.norms), ("loss", w.losses)):
        bad = np.flatnonzero(~np.isfinite(x)) if x is not None else []
        if x is not None and len(bad):
            yield (
                f"{name}-not-finite",
                f"the {name} is NaN or infinite on {len(bad)} of {len(x)} steps, first on the {bad[0] + 1}. of them.",
                {"steps": len(bad), "share": len(bad) / len(x), "first": int(bad[0])},
                "optaxclip.skip_nonfinite(optimizer), so that such a step moves nothing; optaxclip.explain with a watch"
                " names the block that was first and the batch (tag=): look there for logs, roots and divisions at 0,"
                " and exponentials in half precision.",
            )


def _exploding(w: Window) -> Found:
    x = _sound(w.norms)
    sizes = [len(x) >> halvings for halvings in range(12) if len(x) >> halvings >= 8]
    fits = [fit for fit in (_fit(x[-size:]) for size in sizes) if fit.growth >= 10 and fit.r2 >= 0.85]
    if fits:
        fit = max(fits, key=lambda fit: fit.r2)
        double = fit.evidence()["doubling_steps"]
        yield (
            "norms-exploding",
            f"the norm grows exponentially, {short(fit.growth)}-fold over the last {fit.steps} steps: it doubles every"
            f" {short(double)} steps.",
            fit.evidence(),
            "a lower learning rate or a longer warm-up; a clip at what was usual before (optaxclip.zclip() finds it);"
            " in a recurrent network an orthogonal start, or shorter sequences.",
        )


def _halves(x: np.ndarray) -> tuple[float, float, float]:
    """The medians of both halves, and the standard error of their difference."""
    a, b = np.array_split(x, 2)
    spread = 1.4826 * np.mean([np.median(np.abs(half - np.median(half))) for half in (a, b)])
    return float(np.median(a)), float(np.median(b)), float(1.25 * spread * np.sqrt(2 / max(len(b), 1)))


def _loss(w: Window) -> Found:
    x = w.losses[np.isfinite(w.losses)] if w.losses is not None else np.zeros(0)
    if len(x) < 2 * _ENOUGH:
        return
    before, after, error = _halves(x)
    change = (after - before) / max(abs(before), 1e-30)
    evidence = {"before": before, "after": after, "change": change, "standard_error": error}
    if abs(change) < 0.02 and abs(after - before) <= 2 * error:
        yield (
            "loss-not-moving",
            f"the loss is {short(before)} in the first half of the window and {short(after)} in the second, no more"
            f" apart than its noise.",
            evidence,
            "if it has not converged: a higher learning rate, or a higher bound if the clip is always active; look for"
            " vanishing norms, saturated units and detached parameters.",
        )
    if change > 0.1 and after - before > 4 * error:
        yield (
            "loss-rising",
            f"the loss rises from {short(before)} to {short(after)}, the medians of the window's halves.",
            evidence,
            "a lower learning rate; an earlier checkpoint, with optaxclip.skip_spikes(optimizer).",
        )


def _vanishing(w: Window) -> Found:
    x = _sound(w.norms)
    if len(x) < _ENOUGH:
        return
    fit, least = _fit(x), 1e-4
    if w.losses is not None and np.isfinite(w.losses).any():
        before, after, error = _halves(w.losses[np.isfinite(w.losses)])
        least = 1e-2 if before - after <= 2 * error else 0.0  # where the loss falls, so may the norms
    if fit.growth <= least and fit.r2 >= 0.85:
        yield (
            "norms-vanishing",
            f"the norm falls exponentially, to {fit.growth:.1g} of what it was {fit.steps} steps before.",
            {"growth": fit.growth, "r2": fit.r2, "steps": fit.steps},
            "normalisation layers, residual connections, units that do not saturate; in float16 a loss scale.",
        )


def _params(w: Window) -> Found:
    x = _sound(w.param_norms) if w.param_norms is not None else np.zeros(0)
    if len(x) < _ENOUGH:
        return
    fit, late = _fit(x), x[-1] / x[len(x) // 2]
    if fit.growth >= 3 and fit.r2 >= 0.8 and late >= 1.3:
        yield (
            "weights-growing",
            f"the norm of the parameters grows {short(fit.growth)}-fold over {fit.steps} steps, {short(late)}-fold in"
            " the second half.",
            fit.evidence(),
            "weight decay (optax.adamw), a lower learning rate, normalisation of activations or of logits.",
        )


def _series(blocks: dict[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """The norms of numbered layers: by the name before the number, then by the number."""
    squares: dict[str, dict[int, np.ndarray]] = {}
    for name, x in blocks.items():
        for match in re.finditer(r"\d+", name):
            layers = squares.setdefault(name[: match.start()], {})
            layers[int(match[0])] = layers.get(int(match[0]), np.zeros(len(x))) + np.square(x)
    return {head: {n: np.sqrt(x) for n, x in sorted(layers.items())} for head, layers in squares.items()}


def _depth(w: Window) -> Found:
    for head, layers in _series(w.blocks).items():
        usual = {n: np.median(x[np.isfinite(x)]) for n, x in layers.items() if np.isfinite(x).any()}
        norms = np.array([x for x in usual.values() if x > 0])
        if len(norms) < 4:
            continue
        fit = _fit(norms)
        if max(fit.growth, 1 / fit.growth) >= 100 and fit.r2 >= 0.85:
            vanishes, ratio = fit.growth > 1, max(fit.growth, 1 / fit.growth)
            per_layer = ratio ** (1 / (len(norms) - 1))
            yield (
                "norms-fall-with-depth" if vanishes else "norms-grow-with-depth",
                f"from {head}{max(usual)} back to {head}{min(usual)} the norm {'falls' if vanishes else 'grows'}"
                f" {short(ratio)}-fold, by {short(per_layer)} a layer.",
                {"ratio": ratio, "per_layer": per_layer, "r2": fit.r2, "layers": len(norms)},
                "residual connections, normalisation layers, a start that keeps the scale (He, orthogonal); for the"
                " time being optaxclip.clip_by_leaf_norm, or larc, which give each layer a bound of its own.",
            )


def _bounded(w: Window) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """For each clip with bounds its name, the norms over the bounds, and the numbers."""
    for head, clip in w.clips.items():
        fine = np.isfinite(clip["grad_norm"]) & np.isfinite(clip["bound"])
        norms, bounds, share = (clip[field][fine] for field in ("grad_norm", "bound", "clipped"))
        if len(norms) >= _ENOUGH:
            usual = {"norm": float(np.median(norms)), "bound": float(np.median(bounds))}
            evidence = {"share": float(np.mean(share > 0)), "steps": len(norms)} | usual
            yield head.rstrip("/") or "the clip", norms / np.maximum(bounds, 1e-30), evidence


def _clip_always(w: Window) -> Found:
    for name, _, evidence in _bounded(w):
        if evidence["share"] >= 0.95:
            yield (
                "clip-always-active",
                f"{name} is active on {percent(evidence['share'])} of steps: the norm is {short(evidence['norm'])} as a"
                f" rule, the bound {short(evidence['bound'])}. All gradients have one length.",
                evidence,
                "a bound of the size that norms have, or one that follows them: optaxclip.zclip(), quantile_clip(0.9).",
            )


def _clip_never(w: Window) -> Found:
    for name, ratios, evidence in _bounded(w):
        nearest = float(np.max(ratios))
        if not evidence["share"] and nearest < 0.2 and len(ratios) >= 100:
            yield (
                "clip-never-active",
                f"{name} was not active on any of {len(ratios)} steps: the norm came to {percent(nearest)} of the bound"
                f" at most. A spike of {short(1 / max(nearest, 1e-30))} times that would pass.",
                evidence | {"nearest": nearest},
                "a bound of a few times the usual norm, or one that follows it: optaxclip.zclip(), quantile_clip().",
            )


def _heavy_tail(w: Window) -> Found:
    x = _sound(w.norms)
    if len(x) < 100:
        return
    usual = np.array([np.median(x[max(i - 25, 0) : i + 26]) for i in range(len(x))])
    ratio = np.sort(x / usual)
    top = ratio[-len(ratio) // 10 :]
    index = 1 / max(float(np.mean(np.log(top / top[0]))), 1e-30)
    high = float(np.quantile(ratio, 0.99))
    if index < 2 and high >= 4:
        yield (
            "heavy-tail",
            f"1 % of the norms are over {short(high)} times the median around them, the largest {short(ratio[-1])}"
            f" times; with a tail index of {short(index)} their variance does not settle.",
            {"tail_index": index, "quantile_99": high, "largest": float(ratio[-1])},
            "a clip: without one a few steps decide where the run goes. quantile_clip(0.9) or zclip(); a larger batch.",
        )


RULES = (_not_finite, _exploding, _vanishing, _depth, _loss, _params, _clip_always, _clip_never, _heavy_tail)
