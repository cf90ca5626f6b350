"""Finds whether the loss and the weights move, and how."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_number
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.fits import compare_parts, fell_early, fit_growth, is_known
from optaxclip.monitoring.recorded import RecordedRun


def moving(run: RecordedRun) -> Iterator[Sign]:
    """Finds a loss that rises, or does not move, and then whether the weights do."""
    x = run.losses[np.isfinite(run.losses)]
    if len(x) < 2 * limits.ENOUGH:
        return
    before, after, error = compare_parts(*np.array_split(x, 2))
    change = (after - before) / max(abs(before), 1e-30)
    evidence = {"before": before, "after": after, "change": change, "standard_error": error}
    # The loss of a run that has converged did move at first, which a late record does not show.
    stuck = abs(change) < limits.UNMOVED and not (fell_early(x) or run.losses_begin_late)
    # Full-batch losses have no noise: a small fall is still many standard errors.
    if stuck and _weights_are_still(run):
        yield _too_low(run, evidence)
    elif stuck and abs(after - before) <= limits.UNMOVED_ERRORS * error:
        yield _not_moving(evidence)
    elif change > limits.RISEN and after - before > limits.RISEN_ERRORS * error:
        yield _loss_rising(evidence)


def _weights_are_still(run: RecordedRun) -> bool:
    known = run.param_norms[is_known(run.param_norms)]
    return len(known) >= limits.ENOUGH and bool(np.ptp(known) < limits.STILL * np.median(known))


def _too_low(run: RecordedRun, evidence: dict[str, float]) -> Sign:
    w = run.param_norms
    moved = float(np.ptp(w[is_known(w)]) / np.median(w[is_known(w)]))
    return Sign(
        "learning-rate-too-low",
        f"in {len(w)} steps the norm of the weights changes by {moved:.1g} of itself, and the loss"
        f" by {abs(evidence['change']):.1g}, although there are gradients.",
        evidence | {"moved": moved},
        "ten times the learning rate, then ten times again, until the loss moves; in bfloat16,"
        " updates of less than 1/256 of a weight are lost: keep a float32 copy of the weights.",
    )


def _not_moving(evidence: dict[str, float]) -> Sign:
    return Sign(
        "loss-not-moving",
        f"the loss is {format_number(evidence['before'])} in the first half of the run and"
        f" {format_number(evidence['after'])} in the second: the difference is within its noise.",
        evidence,
        "if it has not converged: a higher learning rate, or a higher bound if the clip is always"
        " active; record param_norm= to see whether the weights move.",
    )


def _loss_rising(evidence: dict[str, float]) -> Sign:
    return Sign(
        "loss-rising",
        f"the loss rises from {format_number(evidence['before'])} to"
        f" {format_number(evidence['after'])}, the medians of the two halves of the run.",
        evidence,
        "a lower learning rate, from a checkpoint before the rise.",
    )


def growing(run: RecordedRun) -> Iterator[Sign]:
    """Finds weights that grow exponentially: those that start at zero grow ever more slowly."""
    x = run.param_norms[is_known(run.param_norms)]
    if len(x) < limits.ENOUGH:
        return
    # If growth is like t or sqrt(t), its factor is smaller in the second half; in an exponential
    # both halves have the same factor.
    fit, middle = fit_growth(x), x[len(x) // 2]
    early, late = middle / x[0], x[-1] / middle
    grows = fit.growth >= limits.GROWN and fit.r2 >= limits.GROWN_R2
    if grows and late >= max(early, 1) ** limits.GROWN_LATE:
        doubling = np.log(2) * (fit.steps - 1) / np.log(fit.growth)
        yield Sign(
            "weights-growing",
            f"the norm of the parameters grows {format_number(fit.growth)}-fold over {fit.steps}"
            f" steps, {format_number(late)}-fold in the second half.",
            {**fit._asdict(), "doubling_steps": float(doubling)},
            "weight decay (optax.adamw); normalization of activations or logits.",
        )
