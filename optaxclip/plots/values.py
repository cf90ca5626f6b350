"""The picture of a sweep: loss against threshold, the clip rate beside it."""

from typing import TYPE_CHECKING, Any

import numpy as np

from optaxclip.plots.axes import DARK, GREY, axes_or_new, plain_numbers

if TYPE_CHECKING:
    from optaxclip.sweep import Sweep


def plot_sweep(sweep: "Sweep", ax: Any = None) -> Any:
    """Draws the final loss against the value: the median, best to worst over seeds, and the clip rate (right axis).

    The dotted line is no clip, the star the recommendation, the shade its plateau; a cross at the upper edge says how
    many runs diverged.

    Args:
      sweep: what `optaxclip.tune` returned.
      ax: where to draw; None: a new figure.

    Returns:
      The axes of the loss.

    >>> import numpy as np, optaxclip
    >>> losses = np.array([[3.0, 3.1], [1.0, 1.1], [2.0, 2.2]])
    >>> runs = np.zeros((3, 2, 5))
    >>> sweep = optaxclip.Sweep(np.array([0.1, 1.0, np.inf]), np.arange(2), losses, runs, runs, runs, 4.0, np.inf)
    >>> ax = optaxclip.plots.plot_sweep(sweep)
    >>> ax.lines[0].get_ydata()
    array([3.05, 1.05])
    """
    ax = axes_or_new(ax)
    real = np.flatnonzero((sweep.values != sweep.baseline) & np.isfinite(sweep.values))
    values, kept = sweep.values[real], np.where(sweep.diverged, np.nan, sweep.final)[real]
    median, low, high = (_over_seeds(kept, q) for q in (0.5, 0.0, 1.0))
    error = np.array([median - low, high - median])
    ax.errorbar(values, median, error, color=DARK, marker="o", capsize=3, linewidth=1.3, label="median, best to worst")
    _baseline(ax, sweep)
    _diverged(ax, values, sweep.diverged[real])
    _recommended(ax, sweep)
    ax.set(xlabel="value", ylabel="final loss")
    if (values > 0).all():
        ax.set_xscale("log")
        plain_numbers(ax.xaxis)
    handles, labels = ax.get_legend_handles_labels()
    rate = ax.twinx()
    (line,) = rate.plot(values, sweep.clip_rate[real], "s--", color=GREY, markersize=4, linewidth=1.0, zorder=0)
    rate.set(ylabel="clip rate", ylim=(-0.03, 1.03))
    where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 3, "borderaxespad": 0.2}
    ax.legend([*handles, line], [*labels, "clip rate (right)"], fontsize=8, **where)
    return ax


def _over_seeds(kept: np.ndarray, q: float) -> np.ndarray:
    """A quantile over the seeds that did not diverge; NaN if all did."""
    return np.array([np.quantile(row[~np.isnan(row)], q) if not np.isnan(row).all() else np.nan for row in kept])


def _baseline(ax: Any, sweep: "Sweep") -> None:
    where = np.flatnonzero(sweep.values == sweep.baseline)
    if where.size and not sweep.diverged[where[0]].all():
        final = sweep.final[where[0]][~sweep.diverged[where[0]]]
        lost = f", {sweep.diverged[where[0]].mean():.0%} diverged" if sweep.diverged[where[0]].any() else ""
        ax.axhline(np.median(final), color=DARK, linestyle=":", linewidth=1.3, label="no clip" + lost)
    elif where.size:
        ax.plot([], [], " ", label="no clip: all diverged")


def _diverged(ax: Any, values: np.ndarray, diverged: np.ndarray) -> None:
    """A cross over each value that lost runs, and how many."""
    some = np.flatnonzero(diverged.any(axis=1))
    if not some.size:
        return
    over = ax.get_xaxis_transform()
    ax.plot(values[some], np.full(len(some), 0.95), "x", color=DARK, markersize=8, transform=over, label="diverged")
    for i in some:
        said = f" {diverged[i].sum()}/{diverged.shape[1]}"
        ax.text(values[i], 0.95, said, transform=over, fontsize=8, va="center")


def _recommended(ax: Any, sweep: "Sweep") -> None:
    choice = sweep.recommended
    if not np.isfinite(choice.value):
        return
    if choice.low < choice.high:
        ax.axvspan(choice.low, choice.high, facecolor="0.93", edgecolor="0.75", hatch="///", zorder=-1, linewidth=0)
    at = int(np.flatnonzero(sweep.values == choice.value)[0])
    median = _over_seeds(np.where(sweep.diverged, np.nan, sweep.final)[at : at + 1], 0.5)
    label = f"recommended: {choice.value:g}"
    style = {"markersize": 15, "markerfacecolor": "white", "markeredgecolor": DARK, "zorder": 5, "linestyle": ""}
    ax.plot([choice.value], median, "*", label=label, **style)
