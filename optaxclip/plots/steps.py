"""Plots norms, losses, bounds, and how often a run was clipped, over its steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from optaxclip import validate
from optaxclip.monitoring.fits import is_known, is_recorded
from optaxclip.monitoring.recorded import read_run, require_norms
from optaxclip.monitoring.tables import Recorded
from optaxclip.plots.axes import (
    axes_or_new,
    colors_of,
    draw_bad,
    draw_clipped,
    draw_dashed,
    draw_legend_above,
    draw_over_steps,
    format_ticks,
    name_axes,
    positive,
)


@validate.named
def plot_norms(history: Recorded, ax: Any = None, *, clip: int = 0) -> Any:
    """Draws the norm before the clip, the bound, and how often it clipped, on a log scale.

    The height of the band at the lower edge shows the share of steps that were clipped. Steps whose
    norm is NaN or infinite are hatched; steps whose norm is zero are marked at the lower edge.

    Args:
      history: a `History`, a list with what `optaxclip.metrics` returned at each step, or a dict of
        arrays with one entry per step. It must have a watch, or a clip that measures (value clips
        do not by default).
      ax: where to draw; None: a new figure.
      clip: the number of the clip, if there are several in the state.

    Returns:
      The axes.

    Raises:
      ImportError: without matplotlib.
      ValueError: for an empty history, or one without norms.

    >>> import optaxclip
    >>> history = optaxclip.History()
    >>> for norm in (1.0, 4.0, 3.0):
    ...     history.append({"grad_norm": norm, "bound": 2.0, "clipped": float(norm > 2)})
    >>> ax = optaxclip.plots.plot_norms(history)
    >>> ax.get_legend_handles_labels()[1]
    ['norm before the clip', 'bound', 'clipped: 67 % of steps']
    """
    run = read_run(history, clip)
    norms, part = require_norms(run), run.clip
    ax = axes_or_new(ax)
    label = "norm before the clip" if part else "norm"
    draw_over_steps(ax, run.steps, positive(norms), color=colors_of(ax).line, label=label)
    # The bound of a clip that does not measure is a bound of elements, not of norms.
    bounds = part.get("bound") if "grad_norm" in part else None
    if bounds is not None and np.isfinite(bounds).any():
        draw_dashed(ax, run.steps, positive(bounds), "bound")
    # Before the band, whose height depends on the scale of the axes.
    ax.set_yscale("log")
    draw_clipped(ax, run.steps, part.get("clipped", np.zeros(len(norms))))
    draw_bad(ax, run.steps, ~np.isfinite(norms))
    _draw_zeros(ax, run.steps, norms == 0)
    name_axes(ax, "gradient norm")
    format_ticks(ax.yaxis)
    draw_legend_above(ax)
    return ax


def _draw_zeros(ax: Any, steps: np.ndarray, zero: np.ndarray) -> None:
    """Marks zeros at the lower edge, because they have no place on a log scale."""
    if zero.any():
        style = {"color": colors_of(ax).bad, "transform": ax.get_xaxis_transform()}
        label = f"zero: {zero.sum()} steps"
        ax.plot(steps[zero], np.zeros(zero.sum()), "|", markersize=14, label=label, **style)


@validate.named
def plot_loss(history: Recorded, ax: Any = None, *, key: str = "loss", clip: int = 0) -> Any:
    """Draws the loss, with the share of steps that were clipped, and steps where it is NaN.

    The scale is logarithmic if the losses are positive and span more than a factor of 100.

    Args:
      history: as for `plot_norms`, with the loss added to the metrics: `optaxclip.metrics(state) |
        {"loss": loss}`.
      ax, clip: as for `plot_norms`.
      key: the key of the loss.

    Raises:
      ValueError: if there is no loss in the history.

    >>> import optaxclip
    >>> history = [{"clip/clipped": 0.0, "loss": 3.0}, {"clip/clipped": 1.0, "loss": float("nan")}]
    >>> optaxclip.plots.plot_loss(history).get_legend_handles_labels()[1]
    ['loss', 'clipped: 50 % of steps', 'NaN or infinite: 1 step']
    """
    run = read_run(history, clip, every_row=True)
    if key not in run.table:
        raise ValueError(
            f"plot_loss: no {key!r} in the history: append optaxclip.metrics(state) |"
            f" {{{key!r}: loss}}."
        )
    recorded = is_recorded(run.table[key])
    ax, steps, losses = axes_or_new(ax), run.steps[recorded], run.table[key][recorded]
    known = losses[np.isfinite(losses)]
    shown = np.where(np.isfinite(losses), losses, np.nan)
    draw_over_steps(ax, steps, shown, color=colors_of(ax).line, label=key)
    # Losses of a run that learns are 2- to 10-fold apart, and people expect a linear axis for them.
    if known.size and known.min() > 0 and known.max() > 100 * known.min():
        ax.set_yscale("log")
        format_ticks(ax.yaxis)
    elif known.size and np.ptp(known) > 1e4 * max(np.median(np.abs(known)), 1e-30):
        # Losses that may be negative, and diverge.
        ax.set_yscale("symlog", linthresh=max(float(np.median(np.abs(known))), 1e-30))
    draw_clipped(ax, run.steps, run.clip.get("clipped", np.zeros(len(run.steps))))
    draw_bad(ax, steps, ~np.isfinite(losses))
    name_axes(ax, key)
    draw_legend_above(ax)
    return ax


@validate.named
def plot_clipped_share(
    history: Recorded, ax: Any = None, *, window: int | None = None, clip: int = 0
) -> Any:
    """Draws the share of steps that were clipped, over the last `window` and since the start.

    Args:
      window: the width of the window in steps; None: a twentieth of the run, at least 10.
      history, ax, clip: as for `plot_norms`.

    Raises:
      ValueError: for an empty history, or one that does not record what was clipped.

    >>> import numpy as np, optaxclip
    >>> ax = optaxclip.plots.plot_clipped_share({"clipped": np.tile([1.0, 0.0], 50)}, window=10)
    >>> float(ax.lines[0].get_ydata()[-1]), float(ax.lines[1].get_ydata()[-1])
    (0.5, 0.5)
    """
    run = read_run(history, clip)
    if "clipped" not in run.clip:
        raise ValueError(
            f"plot_clipped_share: no 'clipped' in the history, only {sorted(run.table)[:20]}:"
            " append optaxclip.metrics(opt_state) of a chain with a clip that measures."
        )
    clipped, ax = np.nan_to_num(run.clip["clipped"]), axes_or_new(ax)
    window = window or max(len(clipped) // 20, 10)
    # With running sums the cost does not depend on the width of the window.
    total = np.concatenate([[0.0], np.cumsum(clipped)])
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - window, 0)
    recent, color = (total[ends] - total[starts]) / (ends - starts), colors_of(ax).clip
    # An area as well as a line, because in grey print two similar lines look the same.
    ax.fill_between(run.steps, recent, color=color, alpha=0.3, linewidth=0)
    label = f"of the last {window} steps"
    ax.plot(run.steps, recent, color=color, linewidth=1.2, label=label)
    draw_dashed(ax, run.steps, total[1:] / ends, "of all steps so far")
    draw_bad(ax, run.steps, ~np.isfinite(run.clip.get("grad_norm", np.zeros(len(clipped)))))
    name_axes(ax, "share clipped", ylim=(-0.03, 1.03))
    draw_legend_above(ax)
    return ax


@validate.named
def plot_bound(history: Recorded, ax: Any = None, *, clip: int = 0) -> Any:
    """Draws the bound over the range of the norms around each step.

    Args:
      history, ax, clip: as for `plot_norms`.

    Raises:
      ValueError: for an empty history, or one without norms or a bound.

    >>> import numpy as np, optaxclip
    >>> norms = np.geomspace(1.0, 2.0, 40)
    >>> ax = optaxclip.plots.plot_bound({"grad_norm": norms, "bound": 1.5 * norms})
    >>> ax.get_legend_handles_labels()[1]
    ['5 % to 95 % of norms', 'median norm', 'bound']
    """
    run = read_run(history, clip)
    norms, bounds = require_norms(run), run.clip.get("bound")
    if bounds is None:
        raise ValueError("plot_bound: no 'bound' in the history: append optaxclip.metrics(state).")
    ax = axes_or_new(ax)
    color, window = colors_of(ax).line, max(len(norms) // 40, 10)
    # Separate stretches, because a running window over NaN has no quantiles.
    parts = np.array_split(np.arange(len(norms)), max(len(norms) // window, 1))
    kept = [part[is_known(norms[part])] for part in parts]
    middle = [run.steps[part].mean() for part in kept if part.size]
    # Not from the smallest to the largest: a single spike would hide everything else.
    ranges = [np.quantile(norms[part], (0.05, 0.5, 0.95)) for part in kept if part.size]
    low, usual, high = np.array(ranges).reshape(-1, 3).T
    band = {"color": color, "alpha": 0.3, "linewidth": 0}
    ax.fill_between(middle, low, high, label="5 % to 95 % of norms", **band)
    ax.plot(middle, usual, color=color, linewidth=1.0, label="median norm")
    draw_dashed(ax, run.steps, positive(bounds), "bound")
    draw_bad(ax, run.steps, ~np.isfinite(norms))
    name_axes(ax, "gradient norm", yscale="log")
    format_ticks(ax.yaxis)
    draw_legend_above(ax)
    return ax
