"""Finds lost steps: not finite, skipped by a wrapper, or with a state that was not kept."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optaxclip.monitoring import limits
from optaxclip.monitoring.display import format_share
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.fits import find_runs, zeros_at_end
from optaxclip.monitoring.recorded import RecordedRun
from optaxclip.monitoring.signs.blocks import first_lost, in_block, step_at
from optaxclip.monitoring.tables import Columns
from optaxclip.wrappers.steps import LOSS, NONFINITE, NORM

_WRAP = "Meanwhile use optaxclip.skip_nonfinite(optimizer), so that such a step changes nothing."


def losing(run: RecordedRun) -> Iterator[Sign]:
    """Finds the first loss or norm that is not finite, and what it was."""
    norms = ~np.isfinite(run.norms)
    losses = run.lost_losses if len(run.losses) else np.zeros(len(norms), bool)
    if _is_of_loss_scale(run, norms | losses):
        return
    # If the loss is not finite, neither is its gradient: at the same step the loss comes first.
    if losses.any() and (not norms.any() or np.argmax(losses) <= np.argmax(norms)):
        yield _loss(run, losses)
    elif norms.any():
        yield _norm(run, norms)


def _is_of_loss_scale(run: RecordedRun, bad: np.ndarray) -> bool:
    """Whether a recorded loss scale was lowered at each bad step, and the run continued."""
    scales = run.table.get("loss_scale")
    if scales is None or not bad.any():
        return False
    if max(end - start for start, end in find_runs(bad)) > limits.HALVINGS:
        return False
    # Lowered at that step or at the next: it may be recorded before or after its update.
    lowered = np.diff(scales, prepend=scales[0]) < 0
    here = lowered[bad].mean()
    behind = np.r_[lowered[1:], False][bad].mean()
    # Before the first step and after the last one nothing is known.
    return bool(max(here, behind) * bad.sum() >= bad.sum() - bad[0] - bad[-1])


def _loss(run: RecordedRun, bad: np.ndarray) -> Sign:
    name = "loss-not-finite"
    if np.isinf(run.losses[np.argmax(bad)]):
        cause = (
            "look for a logarithm or a division at 0 in the loss, and add ε inside it (log_softmax"
            " instead of log(softmax))."
        )
        return _lost(run, bad, name, "loss is infinite", cause)
    cause = "look at the batch of this step for NaN or empty entries (watch keeps its tag=)."
    return _lost(run, bad, name, "loss is NaN", cause)


def _norm(run: RecordedRun, bad: np.ndarray) -> Sign:
    first = int(np.argmax(bad))
    block = first_lost(run, first)
    if np.isinf(run.norms[first]):
        cause = (
            "bfloat16, or a dynamic loss scale if this is float16; with one, some such steps are"
            " normal while it searches for its value (record it as loss_scale=)."
        )
        what = "norm is infinite although the loss is finite"
        return _lost(run, bad, "norm-overflow", what, cause, block)
    cause = "look at the loss and the batch of this step (watch keeps its tag=)."
    if block:
        cause = (
            f"look in the backward pass of {block} for roots, norms and divisions at 0: jnp.where"
            " does not stop NaN unless its argument is safe, too."
        )
    return _lost(run, bad, "norm-not-finite", "norm is NaN", cause, block)


def _lost(
    run: RecordedRun, bad: np.ndarray, name: str, what: str, cause: str, block: str = ""
) -> Sign:
    """Says how often it happened, and when first, in words and numbers."""
    first, count = int(np.argmax(bad)), int(bad.sum())
    stays = find_runs(bad)[0] == (first, len(bad)) and count > 1
    often = "from then on" if stays else f"on {count} of {len(bad)} steps"
    evidence = {"steps": count, "share": count / len(bad), "first": first}
    if block:
        evidence["blocks"] = sum(not np.isfinite(x[first]) for x in run.blocks.values())
    step = step_at(run, first)
    text = f"the {what}, first at step {step}, {often}{in_block(block)}."
    return Sign(name, text, evidence, f"{cause} {_WRAP}", step, block)


_REASONS = {
    NORM: (
        "their norms were over the bound",
        "a higher threshold, or one that learns: thresholds.window_zscore(), the default.",
    ),
    LOSS: (
        "their losses were over the bound",
        "a higher loss_threshold, or none: the default learns from the losses.",
    ),
    NONFINITE: (
        "they were not finite",
        "find what is not finite in the first of them: the data, the loss, or the weights; if it is"
        " the weights, go back to a checkpoint.",
    ),
}


def skipping(run: RecordedRun) -> Iterator[Sign]:
    """Finds a run in which no step is applied, or none from some step on."""
    for head, skip in run.skips.items():
        # Uses consecutive skips, not their total, which jumps in a history that is thinned out.
        skipped = skip["consecutive"] > 0
        count, share = zeros_at_end(~skipped), float(skipped.mean())
        often = share >= limits.SKIPPED
        if len(skipped) < 3 or not (often or count >= max(limits.ENOUGH, len(skipped) / 4)):
            continue
        first = int(np.argmax(skipped)) if often else len(skipped) - count
        what, fix = _REASONS.get(int(skip["last_reason"][-1]), ("reason unknown", "find out why."))
        name, step, block = head.rstrip("/") or "skip", step_at(run, first), first_lost(run, first)
        yield Sign(
            "every-step-skipped",
            f"{name} skipped {format_share(np.mean(skipped[first:]))} of the steps from step {step}"
            f" on: {what}{in_block(block)}.",
            {"share": share, "steps": int(skipped.sum()), "first": first},
            fix,
            step,
            block,
        )
        return


def forgetting(run: RecordedRun) -> Iterator[Sign]:
    """Finds step counters that stand still, because the state that `update` returns is not kept."""
    counters = _count_steps(run.watches | run.clips)
    # If every step is skipped, the wrapper still counts the steps that it skips.
    moving = any(np.ptp(x) > 0 for x in (_count_steps(run.skips) | counters).values())
    steps = max(map(len, counters.values()), default=0)
    if steps < limits.ENOUGH or moving or _is_explained(run, counters):
        return
    name, count = next((name, int(x[0])) for name, x in counters.items())
    yield Sign(
        "state-not-kept",
        f"{name} is {count} at each of {steps} steps: the recorded state never advances, so nothing"
        " is learned from one step to the next, and the rest of the record is of no use.",
        {"steps": steps, "count": count},
        "keep the state that update returns, updates, state = tx.update(grads, state, params);"
        " return it from the compiled step, too, and record its optaxclip.metrics(state)."
        " (optax.MultiSteps and apply_if_finite hold back the state inside: record more steps.)",
    )


def _count_steps(parts: dict[str, Columns]) -> dict[str, np.ndarray]:
    """Returns the counter of each part that has one, at the steps where it is known."""
    counters = {f"{head}steps": part["steps"] for head, part in parts.items() if "steps" in part}
    return {name: x[np.isfinite(x)] for name, x in counters.items() if np.isfinite(x).any()}


def _is_explained(run: RecordedRun, counters: dict[str, np.ndarray]) -> bool:
    """Whether counters may stand still although the state is kept."""
    # In a record of several runs, their rows are at the same step.
    together = len(np.unique(run.table.get("run", np.zeros(1)))) > 1
    # Within one accumulation the norms stand still, too; if a state is dropped, they vary.
    paused = any(x[0] > 0 for x in counters.values()) and len(np.unique(run.norms)) == 1
    # Steps that `optax.apply_if_finite` rejects leave no trace except their losses.
    rejected = len(run.losses) > 0 and not np.isfinite(run.losses).any()
    return together or paused or rejected
