"""Plots a sweep: the final loss against the threshold, and the clip rate."""

from __future__ import annotations

from typing import Any

import numpy as np

from optaxclip.plots.axes import GREY, axes_or_new, colors_of, draw_legend_above, format_ticks
from optaxclip.tuning.sweep import Sweep, median_loss


def plot_sweep(sweep: Sweep, ax: Any = None) -> Any:
    """Draws the final loss against the value, and the clip rate on a second axis.

    For each value it shows the median over seeds, and a bar from the best to the worst.

    The dotted line is without a clip, the star is the recommendation, and the hatched range is its
    plateau. A cross at the upper edge is labelled with the number of runs that diverged.

    Args:
      sweep: the result of `optaxclip.tune`.
      ax: where to draw; None: a new figure.

    Returns:
      The axes of the loss.

    >>> import numpy as np, optaxclip
    >>> from optaxclip.tuning import Sweep
    >>> losses = np.array([[3.0, 3.1], [1.0, 1.1], [2.0, 2.2]])
    >>> runs = np.zeros((3, 2, 5))
    >>> values, seeds = np.array([0.1, 1.0, np.inf]), np.arange(2)
    >>> sweep = Sweep(values, seeds, losses, runs, runs, runs, 4.0, np.inf)
    >>> ax = optaxclip.plots.plot_sweep(sweep)
    >>> ax.lines[0].get_ydata()
    array([3.05, 1.05])
    """
    ax = axes_or_new(ax)
    real = np.flatnonzero((sweep.values != sweep.baseline) & np.isfinite(sweep.values))
    values, rows = sweep.values[real], [_summarize_seeds(sweep, int(i)) for i in real]
    # A value whose median run diverged gets NaN, because an infinite loss has no place on the axis.
    low, median, high = np.array(rows).T
    bars, label = np.array([median - low, high - median]), "median, best to worst"
    style = {"color": colors_of(ax).ink, "marker": "o", "capsize": 3, "linewidth": 1.3}
    ax.errorbar(values, median, bars, label=label, **style)
    _draw_baseline(ax, sweep)
    _mark_recommended(ax, sweep)
    # Makes room for the crosses, which would hide the highest losses.
    bottom, top = ax.get_ylim()
    ax.margins(x=0.08)
    ax.set(xlabel=sweep.name, ylabel="final loss", ylim=(bottom, top + 0.2 * (top - bottom)))
    _mark_diverged(ax, values, sweep.diverged[real])
    if (values > 0).all():
        ax.set_xscale("log")
        format_ticks(ax.xaxis)
    _draw_clip_rate(ax, values, sweep.clip_rate[real])
    return ax


def _summarize_seeds(sweep: Sweep, i: int) -> tuple[float, float, float]:
    """Returns best, median and worst of the runs; NaN if the median diverged.

    The best and the worst are those of the runs that did not diverge.
    """
    diverged, final = sweep.diverged[i], sweep.final[i]
    median = median_loss(np.where(diverged, np.inf, final))
    if not np.isfinite(median):
        return np.nan, np.nan, np.nan
    return final[~diverged].min(), median, final[~diverged].max()


def _draw_clip_rate(ax: Any, values: np.ndarray, rates: np.ndarray) -> None:
    """Draws the clip rate on a second axis on the right, in one legend with the loss."""
    beside, (handles, labels) = ax.twinx(), ax.get_legend_handles_labels()
    (line,) = beside.plot(values, rates, "s--", color=GREY, markersize=4, linewidth=1.0)
    beside.set(ylabel="clip rate", ylim=(-0.03, 1.22), yticks=np.linspace(0, 1, 6))
    # By default the second axis covers the first, whose marks matter more.
    ax.set_zorder(beside.get_zorder() + 1)
    ax.patch.set_visible(False)
    labels = [*labels, "clip rate (right)"]
    draw_legend_above(ax, 3, handles=[*handles, line], labels=labels)


def _draw_baseline(ax: Any, sweep: Sweep) -> None:
    where = np.flatnonzero(sweep.values == sweep.baseline)
    if not where.size:
        return
    lost = sweep.diverged[where[0]]
    label = "no clip" + (f": {lost.sum()}/{lost.size} diverged" if lost.any() else "")
    median = _summarize_seeds(sweep, where[0])[1]
    if np.isfinite(median):
        ax.axhline(median, color=colors_of(ax).ink, linestyle=":", linewidth=1.3, label=label)
    else:
        # There is no height to draw a line at, but the legend mentions it.
        ax.plot([], [], " ", label=label)


def _mark_diverged(ax: Any, values: np.ndarray, diverged: np.ndarray) -> None:
    """Draws a cross over each value with diverged runs, and their number."""
    some, over = np.flatnonzero(diverged.any(axis=1)), ax.get_xaxis_transform()
    if not some.size:
        return
    cross = {"color": colors_of(ax).ink, "markersize": 6, "transform": over, "label": "diverged"}
    ax.plot(values[some], np.full(len(some), 0.95), "x", **cross)
    style = {"xytext": (0, -6), "textcoords": "offset points", "va": "top", "ha": "center"}
    for i in some:
        text, at = f"{diverged[i].sum()}/{diverged.shape[1]}", (values[i], 0.95)
        ax.annotate(text, at, xycoords=over, fontsize=7, **style)


def _mark_recommended(ax: Any, sweep: Sweep) -> None:
    choice = sweep.recommended
    if not np.isfinite(choice.value):
        return
    if choice.low < choice.high:
        style = {"facecolor": "none", "edgecolor": GREY, "hatch": "///", "linewidth": 0}
        ax.axvspan(choice.low, choice.high, zorder=0, **style)
    median = _summarize_seeds(sweep, int(np.flatnonzero(sweep.values == choice.value)[0]))[1]
    style = {"markersize": 15, "color": colors_of(ax).ink, "zorder": 5, "linestyle": ""}
    ax.plot([choice.value], [median], "*", label=f"recommended: {choice.value:g}", **style)
