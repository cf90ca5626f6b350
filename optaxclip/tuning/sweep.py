"""The result of a sweep over thresholds: a table and a recommendation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.monitoring.display import escape, markdown_table


class Choice(NamedTuple):
    """The value to take.

    Attributes:
      value: the middle of the plateau; the baseline if every clip is worse; NaN if every run
        diverged.
      mean: its final loss, averaged over seeds; a diverged run counts as no training at all.
      error: the standard error of the mean of the best value.
      low, high: the ends of the plateau, which is the neighbours of the best value within one
        standard error of it.
      why: the reason, in words.
    """

    value: float
    mean: float
    error: float
    low: float
    high: float
    why: str


class Sweep(NamedTuple):
    """What `tune` returns, for V values in rising order and S seeds; prints as a Markdown table.

    Attributes:
      values: (V,), including the baseline.
      seeds: (S,).
      final: (V, S), the final loss of each run.
      losses, clipped, norms: (V, S, steps), the training loss, whether the gradient (or what share
        of its blocks) was clipped, and the norm before the clip; the last two are NaN if the state
        holds no clip that measures.
      failed: a run that ended above this, or not finite, has diverged.
      baseline: the value that stands for no clip, or None.
      name: what `step` calls the value.
    """

    values: np.ndarray
    seeds: np.ndarray
    final: np.ndarray
    losses: np.ndarray
    clipped: np.ndarray
    norms: np.ndarray
    failed: float
    baseline: float | None
    name: str = "value"

    @property
    def diverged(self) -> np.ndarray:
        """(V, S), whether a run diverged."""
        # Negated, so that NaN counts as diverged.
        return ~(self.final <= self.failed)

    @property
    def clip_rate(self) -> np.ndarray:
        """(V,), the share of steps that were clipped, over all seeds."""
        return self.clipped.mean(axis=(1, 2))

    @property
    def recommended(self) -> Choice:
        """The middle of the plateau around the best mean final loss.

        Which value is best depends partly on the seeds. Among all values within one standard error
        of the best, the usual rule takes the simplest, here the largest, which interferes least.
        But the loss rises steeply on that side and gently on the other, so the edge is risky. The
        middle (of two, the larger) is as far from both ends as the grid allows. A diverged run
        counts as no training at all, and no worse: otherwise one bad seed would outweigh any gain.
        """
        return _choose(self)

    def name_of(self, value: float) -> str:
        """Formats a value for a table."""
        return "no clip" if value == self.baseline else f"{value:g}"

    def __str__(self) -> str:
        return f"{_tabulate(self)}\n\n{self.recommended.why}"

    # The repr of a tuple would print the arrays of all runs.
    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return f"{_tabulate(self, mark=self.recommended.value)}\n\n{escape(self.recommended.why)}"


def final_loss(losses: np.ndarray) -> np.ndarray:
    """Takes the median of the last tenth of the steps; NaN counts as infinite."""
    # Many steps, because the loss of a single one depends on its batch.
    last = losses[..., -max(losses.shape[-1] // 10, 1) :]
    # One NaN would make the median NaN, and runs could not be compared.
    return np.median(np.where(np.isnan(last), np.inf, last), axis=-1)


def cap_diverged(final: np.ndarray, failed: float) -> np.ndarray:
    """Makes a diverged run count as no training at all."""
    return np.where(final <= failed, final, failed)


def _tabulate(sweep: Sweep, mark: float | None = None) -> str:
    """Tabulates one row per value; the row of the value to mark is bold."""
    head = (sweep.name, "final loss: median", "best to worst", "clipped", "diverged")
    rows = [_format_row(sweep, i) for i in range(len(sweep.values))]
    bold = [[f"**{x}**" if x else x for x in row] for row in rows]
    marked = zip(sweep.values, rows, bold, strict=True)
    return markdown_table(head, [loud if value == mark else row for value, row, loud in marked])


def _format_row(sweep: Sweep, i: int) -> list[str]:
    final = np.where(np.isnan(sweep.final[i]), np.inf, sweep.final[i])
    # Without a clip that measures the rate is unknown, which is not a rate of 0.
    rate = "" if np.isnan(sweep.clip_rate[i]) else f"{sweep.clip_rate[i]:.0%}"
    return [
        sweep.name_of(sweep.values[i]),
        f"{median_loss(final):.4g}",
        f"{final.min():.4g} to {final.max():.4g}",
        rate,
        f"{sweep.diverged[i].mean():.0%}",
    ]


def median_loss(final: np.ndarray) -> float:
    """Takes the median; if some losses are infinite, the upper of the middle two."""
    # Interpolation halfway between a number and infinity would give NaN.
    return float(np.quantile(final, 0.5, method="higher" if np.isinf(final).any() else "linear"))


def _choose(sweep: Sweep) -> Choice:
    # Capped, because otherwise a run that reached 1e30 would outweigh all others.
    scores = cap_diverged(sweep.final, sweep.failed)
    mean, count = scores.mean(axis=1), scores.shape[1]
    if sweep.diverged.all():
        why = "Every run diverged, at any value: lower the learning rate, or try smaller values."
        return Choice(np.nan, np.nan, np.nan, np.nan, np.nan, why)
    best = int(np.argmin(mean))
    # The error of the best value only: pooled over all values, diverged runs would stretch the
    # plateau over the whole grid.
    error = float(scores[best].std(ddof=1) / count**0.5) if count > 1 else 0.0
    near = mean <= mean[best] + error
    low, high = _find_plateau(near, best)
    # The baseline may be on the plateau, but it is not a threshold to recommend.
    inside = [i for i in range(low, high + 1) if sweep.values[i] != sweep.baseline] or [best]
    pick = inside[len(inside) // 2]
    ends = float(sweep.values[inside[0]]), float(sweep.values[inside[-1]])
    choice = Choice(float(sweep.values[pick]), float(mean[pick]), error, *ends, "")
    return choice._replace(why=_explain_choice(sweep, choice, best, near))


def _find_plateau(near: np.ndarray, best: int) -> tuple[int, int]:
    """Finds the ends of the run of True that contains `best`."""
    low = high = best
    while low > 0 and near[low - 1]:
        low -= 1
    while high < len(near) - 1 and near[high + 1]:
        high += 1
    return low, high


def _explain_choice(sweep: Sweep, choice: Choice, best: int, near: np.ndarray) -> str:
    numbers = f"mean final loss {choice.mean:.4g}; standard error of the best {choice.error:.2g}"
    numbers += f", {len(sweep.seeds)} seeds"
    if choice.value == sweep.baseline:
        return f"Recommended: no clip ({numbers}). Every clip that was tried is worse."
    several = choice.low < choice.high
    middle = f"the middle of {choice.low:g} to {choice.high:g}, which are"
    plateau = middle if several else "alone"
    text = f"Recommended: {choice.value:g}, {plateau} within one standard error of the best"
    text += f" ({numbers})."
    real = [i for i, value in enumerate(sweep.values) if value != sweep.baseline]
    if near[sweep.values == sweep.baseline].any():
        text += " Training without a clip is as good: here a clip is only insurance."
    elif best in (real[0], real[-1]):
        text += " The best is the last value on its side of the grid: try values beyond it."
    return text if len(sweep.seeds) > 1 else text + " One seed says nothing about the spread."
