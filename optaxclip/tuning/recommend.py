"""Recommends a clip and its threshold from the norms of a short run recorded without one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from optaxclip import validate
from optaxclip.monitoring.fits import is_known
from optaxclip.monitoring.recorded import read_run
from optaxclip.monitoring.tables import is_history
from optaxclip.states import kind_of
from optaxclip.tuning.recommendation import Reason, Recommendation
from optaxclip.tuning.series import FEWEST, Numbers, log_known, measure_series

SHARES = (0.01, 0.05, 0.10)


@validate.named
def recommend(norms: Any, *, shares: tuple[float, ...] = SHARES) -> Recommendation:
    """Recommends thresholds and a method from the norms of a run without a clip.

    Record a hundred steps or more with `optaxclip.watch()`, which only measures, or with any clip:
    the norms in its metrics are those before the clip. (A clip changes the run, so clip as little
    as you can while recording.)

    Args:
      norms: norms of the whole gradient, (steps,); or by layer, (steps, layers), or a dict of
        (steps,); or the history itself, a list of what `optaxclip.metrics` returned at each step.
        Norms by layer are assumed to be L2 norms of disjoint leaves.
      shares: the shares of steps to clip; the line of code aims at the middle one.

    Returns:
      A `Recommendation`. Rules of thumb decide what stands out, and each reports its numbers: a
      tail is heavy if the 99th percentile is over 4 medians; otherwise it has spikes if one step is
      over 10; norms drift if they change twofold and by more than 4 standard errors; layers differ
      if their medians differ 30-fold; norms are steady if the 99th percentile is within 2 medians.

    Raises:
      ValueError: for norms of another shape, a recorded run without norms, or shares outside (0,
        1).

    >>> import numpy as np, optaxclip
    >>> found = optaxclip.recommend(np.random.default_rng(0).lognormal(0.0, 0.2, 1000))
    >>> for reason in found.reasons:
    ...     print(reason.name, "-", reason.method)
    steady - A fixed global norm is enough.
    >>> print(found.code)
    tx = optax.chain(optaxclip.clip_by_global_norm(1.35), optimizer)
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"recommend: shares must be between 0 and 1, got {shares!r}.")
    whole, layers = _read(norms)
    numbers = measure_series(whole, layers)
    thresholds = _find_thresholds(whole, shares)
    by_layer = {name: _find_thresholds(x, shares) for name, x in layers.items()}
    # The measurements are returned anyway; only advice needs more steps.
    if len(whole) - numbers.nonfinite - numbers.zeros < FEWEST:
        return Recommendation(thresholds, by_layer, _report_too_few(numbers), numbers, "")
    reasons = _find_reasons(numbers)
    return Recommendation(
        thresholds, by_layer, reasons, numbers, _write_code(whole, numbers, reasons, shares)
    )


def _read(norms: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads the norm of the whole gradient at each step, and the norms of layers, if any."""
    if is_history(norms):
        run = read_run(norms, 0)
        total, layers = run.norms, run.blocks
        # The norm of a clip by layer is that of its largest layer, not that of the whole.
        of_whole = "grad_norm" in run.clip and not any("grad_norm/" in key for key in run.clip)
        if len(total) and (of_whole or not layers):
            return total, layers
        layers = layers or _read_layers(run.table, isinstance(norms, Mapping))
        return _pool_layers(np.stack(list(layers.values()), axis=1)), layers
    try:
        array = np.asarray(norms, float)
    except (TypeError, ValueError):  # a state, say
        array = np.zeros(())
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            "recommend: norms must have the shape (steps,) or (steps, layers), or be a History; got"
            f" {array.shape or kind_of(norms)}. If you have a state, record its metrics at each"
            " step, history.append(optaxclip.metrics(opt_state)), and pass the history."
        )
    if array.ndim == 1:
        return array, {}
    return _pool_layers(array), {str(i): x for i, x in enumerate(array.T)}


def _read_layers(columns: dict[str, np.ndarray], plain: bool) -> dict[str, np.ndarray]:
    """Returns a dict of layer -> norms as it is; raises for a recorded run without norms."""
    recorded = any(re.search(r"(^|/)(clip|watch|skip)/|^loss$", key) for key in columns)
    if plain and not recorded:
        return columns
    raise ValueError(
        f"recommend: there is no 'grad_norm' among {sorted(columns)}: record"
        " optaxclip.metrics(state) at each step (with a clip that measures, or with"
        " optaxclip.watch()), or pass norms of the shape (steps,) or (steps, layers), or a dict of"
        " layer -> norms."
    )


def _pool_layers(by_layer: np.ndarray) -> np.ndarray:
    """Computes the norm of all layers together, without overflow."""
    # Relative to the largest layer, whose square may overflow float64.
    unit = np.max(np.abs(by_layer), axis=1, keepdims=True)
    unit = np.where(unit > 0, unit, 1.0)
    with np.errstate(invalid="ignore"):
        return unit[:, 0] * np.sqrt(np.sum(np.square(by_layer / unit), axis=1))


def _find_thresholds(norms: np.ndarray, shares: tuple[float, ...]) -> dict[float, float]:
    """Finds the quantile for each share of at least a step; drops 0, which would clip all to 0."""
    # Zeros stay in: they are steps too, and shares are shares of steps.
    finite = norms[np.isfinite(norms)]
    bounds = {
        share: float(np.quantile(finite, 1 - share)) for share in shares if share * len(finite) >= 1
    }
    return {share: bound for share, bound in bounds.items() if bound > 0}


def _report_too_few(n: Numbers) -> tuple[Reason, ...]:
    usable = n.steps - n.nonfinite - n.zeros
    what = f"only {usable} of {n.steps} steps have a norm that is finite and not zero: too few."
    what = f"{n.steps} steps are too few." if usable == n.steps else what
    return (Reason("too-few-steps", what, "Record at least 100."), *_report_nonfinite(n))


def _report_nonfinite(n: Numbers) -> list[Reason]:
    what = f"{n.nonfinite} of {n.steps} norms are NaN or infinite."
    method = "skip_nonfinite(optimizer) skips such steps, with the optimizer's; find the cause."
    return [Reason("nonfinite", what, method)] if n.nonfinite else []


def _find_reasons(n: Numbers) -> tuple[Reason, ...]:
    """Lists what stands out, with "steady" or "ordinary" if a fixed norm can handle it."""
    found = _report_nonfinite(n)
    if n.scale_ratio > 30:
        what = f"the norms of layers differ up to {n.scale_ratio:.3g}-fold."
        method = "One norm sees only the largest; a bound per layer or adaptive_grad_clip sees all."
        found.append(Reason("layer-scales", what, method))
    drift, noise = np.log(n.drift), np.log(n.drift_noise)
    # Both, because in a long run any drift is significant, and in a short run twofold may be noise.
    drifts = abs(drift) > max(np.log(2), 4 * noise)
    if drifts:
        way = f"rise {n.drift:.3g}-fold" if drift > 0 else f"fall {1 / n.drift:.3g}-fold"
        what = f"the norms {way} over the run, {_format_errors(drift, noise)} standard errors."
        method = "A fixed bound fits one end only: a multiple of the running median (capped)."
        found.append(Reason("drift", what, method))
    found += (tail := _report_tail(n))
    if not drifts and not tail and not n.scale_ratio > 30:
        found.append(_report_calm(n))
    return tuple(found)


def _report_tail(n: Numbers) -> list[Reason]:
    """Reports a heavy tail, or else single steps that stand out."""
    if n.tail_ratio > 4:
        what = f"the 99th percentile is {n.tail_ratio:.3g} medians, the largest"
        what = f"{what} {n.spike_ratio:.3g}; tail index {n.tail_index:.2g}."
        method = "A percentile of past norms, or zclip, with a cap until they have learned."
        return [Reason("heavy-tail", what, method)]
    if n.spike_ratio > 10:
        what = f"the largest norm is {n.spike_ratio:.3g} medians, the 99th percentile only"
        what = f"{what} {n.tail_ratio:.3g}."
        method = "A fixed global norm cuts them; skip_spikes(optimizer) leaves such steps out."
        return [Reason("spikes", what, method)]
    return []


def _format_errors(drift: float, noise: float) -> str:
    # Without noise (in a synthetic series) the number of errors is infinite.
    return f"{abs(drift) / noise:.2g}" if noise * 100 > abs(drift) else "over 100"


def _report_calm(n: Numbers) -> Reason:
    if n.tail_ratio < 2:
        return Reason("steady", "the norms hardly vary.", "A fixed global norm is enough.")
    what = f"the norms vary, up to {n.spike_ratio:.3g} medians, without a heavy tail or a drift."
    return Reason("ordinary", what, "A fixed global norm will do; tune it.")


def _write_code(
    norms: np.ndarray, n: Numbers, reasons: tuple[Reason, ...], shares: tuple[float, ...]
) -> str:
    """Writes the line of code, which aims at the middle one of the shares."""
    names = {reason.name for reason in reasons}
    small, middle = min(shares), sorted(shares)[len(shares) // 2]
    known = norms[is_known(norms)]
    percentile = f"optaxclip.thresholds.percentile({100 * (1 - middle):.3g})"
    scope = ", scope=optaxclip.scopes.leaf" if "layer-scales" in names else ""
    # Drift comes first: a fixed bound, or a percentile of old norms, fits only one end of the run.
    if "drift" in names:
        clip = f"optaxclip.clip_by_median({_quantile_over_trend(norms, n, middle):.3g}{scope})"
    elif scope:
        clip = f"optaxclip.clip_by({percentile}{scope})"
    elif "heavy-tail" in names:
        # The minimum, because the quantile may itself be a spike.
        cap = min(np.quantile(known, 1 - small), 10 * n.median)
        clip = f"optaxclip.clip_by(optaxclip.thresholds.at_most({percentile}, {cap:.3g}))"
    else:
        clip = f"optaxclip.clip_by_global_norm({np.quantile(known, 1 - middle):.3g})"
    chain = f"optax.chain({clip}, optimizer)"
    return f"tx = optaxclip.skip_nonfinite({chain})" if "nonfinite" in names else f"tx = {chain}"


def _quantile_over_trend(norms: np.ndarray, n: Numbers, share: float) -> float:
    """Finds the multiple of the running median that a share of norms exceeds; at least 1.1."""
    time, logs = log_known(norms)
    # Without the trend, which the running median follows by itself, though it lags: hence 1.1.
    level = logs - np.log(n.drift) * time
    return max(float(np.exp(np.quantile(level - np.median(level), 1 - share))), 1.1)
