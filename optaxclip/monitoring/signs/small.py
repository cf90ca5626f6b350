"""Finds gradients that are zero, or fade: over the steps, or from layer to layer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_number, format_share
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.fits import (
    compare_parts,
    fell_early,
    find_runs,
    fit_growth,
    is_known,
    zeros_at_end,
)
from optaxclip.monitoring.recorded import RecordedRun
from optaxclip.monitoring.signs.blocks import step_at
from optaxclip.monitoring.summary import natural_key


def zero(run: RecordedRun) -> Iterator[Sign]:
    """Finds blocks, or whole runs, that never get a gradient, or none from some step on."""
    count = len(run.norms)
    if (death := _find_death(run.norms)) is not None:
        step, share = step_at(run, death), float(np.mean(run.norms[death:] == 0))
        yield Sign(
            "zero-gradients",
            f"all gradients are zero {_say_from(step, share)}.",
            {"steps": count - death, "first": death, "share": share},
            "look for what cuts the loss off from the parameters: stop_gradient, argmax or"
            " rounding, parameters that the loss does not use, a loss scale or a mask of 0, or"
            " saturated units.",
            step,
        )
        return
    if not np.isfinite(run.norms[-limits.ENOUGH :]).all():
        # ReLU and masks stop NaN in the backward pass, so zeros after a NaN mean nothing.
        return
    blocks = run.blocks.items()
    deaths = {name: _find_death(x, len(run.blocks)) for name, x in blocks}
    dead = {name: death for name, death in deaths.items() if death}
    frozen = [name for name, death in deaths.items() if death == 0]
    if dead:
        yield _dead(run, dead)
    if frozen:
        yield _frozen(frozen, count)


def _find_death(x: np.ndarray, blocks: int = 1) -> int | None:
    """Returns the index from which there is no gradient, or none at most steps; None if alive."""
    zero, last = x == 0, len(x) - zeros_at_end(x)
    # Rare experts and embeddings pause as well: a pause at the end must be longer than theirs.
    pause = max((end - start for start, end in find_runs(zero[:last])), default=0)
    if len(x) - last >= max(limits.ENOUGH, 3 * pause):
        return last
    first = int(np.argmax(zero))
    share = np.mean(zero[first:])
    # A block that always paused this often would hardly begin with so many steps without a pause.
    new = blocks * (1 - share) ** first < limits.CHANCE
    return first if share >= limits.DYING and new and len(x) - first >= limits.ENOUGH else None


def _say_from(step: int, share: float) -> str:
    often = "" if share == 1 else f"at {format_share(share)} of steps "
    return f"{often}from step {step} on"


def _list(names: list[str]) -> str:
    names = sorted(names, key=natural_key)
    more = f" and {len(names) - 1} more blocks, up to {names[-1]}" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _dead(run: RecordedRun, deaths: dict[str, int]) -> Sign:
    first = min(deaths.values())
    # The one nearest to the loss of those that died first: it lets no gradient through.
    block = max((name for name, death in deaths.items() if death == first), key=natural_key)
    step, share = step_at(run, first), float(np.mean(run.blocks[block][first:] == 0))
    return Sign(
        "layer-dead",
        f"{_list(list(deaths))} had gradients, but none {_say_from(step, share)}, first {block}.",
        {"blocks": len(deaths), "steps": len(run.norms) - first, "first": first, "share": share},
        f"a lower learning rate, and units in or before {block} that pass gradients below zero"
        " (leaky ReLU, GELU): dead ReLUs do not come back by themselves.",
        step,
        block,
    )


def _frozen(names: list[str], count: int) -> Sign:
    return Sign(
        "layer-frozen",
        f"{_list(names)} got no gradient at any of {count} steps.",
        {"blocks": len(names), "steps": count},
        "if it is frozen on purpose, leave it out (watch(exclude=)); if not, look for"
        " stop_gradient, for parameters that the loss does not use, and for two factors that both"
        " start at zero.",
        None,
        max(names, key=natural_key),
    )


def vanishing(run: RecordedRun) -> Iterator[Sign]:
    """Finds norms that fall exponentially while the loss does not."""
    x = run.norms[is_known(run.norms)]
    if len(x) < limits.ENOUGH:
        return
    fit, least = fit_growth(x), limits.FADED_UNKNOWN
    known = run.losses[np.isfinite(run.losses)]
    if judged := len(known) >= limits.ENOUGH:
        # If the loss falls, or fell before, the norms may fall, too.
        least = 0.0 if run.losses_begin_late or _falls(known) else limits.FADED
    if fit.growth <= least and fit.r2 >= limits.RISE_R2:
        yield Sign(
            "norms-vanishing",
            f"the norm falls exponentially, to {fit.growth:.1g} of its value {fit.steps} steps"
            f" earlier{', but the loss does not' if judged else ''}.",
            {"growth": fit.growth, "r2": fit.r2, "steps": fit.steps},
            "gates or residual connections over time and depth (LSTM, GRU), and units that do not"
            " saturate; in float16 a loss scale. A clip cannot help: it never makes norms larger."
            f"{'' if judged else ' Record loss=: if it falls as well, the run just converges.'}",
            step_at(run, 0),
        )


def _falls(losses: np.ndarray) -> bool:
    before, after, error = compare_parts(*np.array_split(losses, 2))
    falls = before - after > max(limits.UNMOVED_ERRORS * error, limits.UNMOVED * abs(before))
    return falls or fell_early(losses)


def _by_depth(blocks: dict[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Returns the norms of numbered layers, by the name before the number, then by the number."""
    squares: dict[str, dict[int, np.ndarray]] = {}
    for name, x in blocks.items():
        # Any number in a path may be the one that counts layers, so each is tried.
        for match in re.finditer(r"\d+", name):
            layers = squares.setdefault(_head(name, match.start()), {})
            with np.errstate(over="ignore"):
                layers[int(match[0])] = layers.get(int(match[0]), 0.0) + np.square(x)
    return {
        head: {n: np.sqrt(x) for n, x in sorted(layers.items())} for head, layers in squares.items()
    }


def _head(name: str, start: int) -> str:
    """Returns what comes before the number of a layer."""
    # `blocks/attn/kernel[3]`: if a model stacks its layers, all leaves with one index are a layer.
    stack, bracket, numbers = name[:start].rpartition("[")
    return stack.split("/")[0] + bracket + numbers if bracket else name[:start]


def depth(run: RecordedRun) -> Iterator[Sign]:
    """Finds norms that fall or grow from each layer to the one before it."""
    for head, layers in _by_depth(run.blocks).items():
        usual = {n: np.median(x[np.isfinite(x)]) for n, x in layers.items() if np.isfinite(x).any()}
        norms = np.array([x for x in usual.values() if x > 0])
        if len(norms) < limits.DEPTH_LAYERS:
            continue
        # The ratio of the ends alone would mistake one odd layer for a trend.
        fit = fit_growth(norms)
        ratio = max(fit.growth, 1 / fit.growth)
        if ratio < limits.DEPTH or fit.r2 < limits.RISE_R2:
            continue
        falls, per_layer = fit.growth > 1, ratio ** (1 / (len(norms) - 1))
        first, last = (f"{head}{n}{']' * ('[' in head)}" for n in (min(usual), max(usual)))
        yield Sign(
            "norms-fall-with-depth" if falls else "norms-grow-with-depth",
            f"from {last} back to {first} the norm {'falls' if falls else 'grows'}"
            f" {format_number(ratio)}-fold, by {format_number(per_layer)} per layer.",
            {"ratio": ratio, "per_layer": per_layer, "r2": fit.r2, "layers": len(norms)},
            "residual connections and normalization layers, or an initialization that keeps the"
            " scale (He for ReLU, orthogonal); meanwhile larc, which gives each layer its own step"
            " size.",
            None,
            first,
        )
