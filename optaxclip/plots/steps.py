"""Plots over the steps of a run: norms, losses, how often it was clipped."""

from __future__ import annotations

from typing import Any

import numpy as np

from optaxclip.monitoring.history import Recorded, require, select_clip
from optaxclip.plots.axes import DARK, GREY, axes_or_new, draw_legend_above, format_ticks


def plot_norms(history: Recorded, ax: Any = None, *, clip: int = 0) -> Any:
    """Draws the norm before the clip, the bound, and the steps that were clipped, on a log scale.

    Steps whose norm is NaN or infinite are triangles at the upper edge.

    Args:
      history: a `History`, a list with what `optaxclip.metrics` returned at each step, or a dict of
        arrays with one entry a step. The clip must measure (value clips do not by default).
      ax: where to draw; None: a new figure.
      clip: which, if there are several clips in the state.

    Returns:
      The axes.

    Raises:
      ImportError: without matplotlib.
      ValueError: for an empty history, or one without norms.

    >>> import optaxclip
    >>> history = optaxclip.History()
    >>> for norm in (1.0, 4.0, 3.0):
    ...     history.append({"grad_norm": norm, "bound": 2.0, "clipped": float(norm > 2)})
    >>> [line.get_label() for line in optaxclip.plots.plot_norms(history).lines]
    ['norm before the clip', 'bound', 'clipped: 67% of steps']
    """
    seen = select_clip(history, clip)
    norms = require(seen, "grad_norm", "plot_norms")
    ax, bounds = axes_or_new(ax), seen.get("bound", np.full(len(norms), np.inf))
    steps, clipped = np.arange(len(norms)), _find_clipped(seen)
    finite = np.isfinite(norms)
    shown = np.where(finite & (norms > 0), norms, np.nan)
    ax.semilogy(steps, shown, color=GREY, linewidth=0.9, label="norm before the clip")
    if np.isfinite(bounds).any():
        bounded = np.where(np.isfinite(bounds) & (bounds > 0), bounds, np.nan)
        ax.semilogy(steps, bounded, color=DARK, linestyle="--", linewidth=1.2, label="bound")
    _mark_clipped(ax, shown, clipped & finite)
    if not finite.all():
        at = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        label = f"NaN or infinite: {np.sum(~finite)}"
        ax.plot(
            steps[~finite],
            np.ones(np.sum(~finite)),
            "v",
            color=DARK,
            markersize=6,
            label=label,
            **at,
        )
    ax.set(xlabel="step", ylabel="gradient norm")
    format_ticks(ax.yaxis)
    draw_legend_above(ax)
    return ax


def plot_loss(history: Recorded, ax: Any = None, *, key: str = "loss", clip: int = 0) -> Any:
    """Draws the loss, with the clipped steps marked on it.

    Args:
      history: as for `plot_norms`, with the loss beside the metrics: `optaxclip.metrics(state) |
        {"loss": loss}`.
      ax, clip: as for `plot_norms`.
      key: what the loss is called.

    Raises:
      ValueError: if there is no loss in the history.

    >>> import optaxclip
    >>> history = [{"clip/clipped": 0.0, "loss": 3.0}, {"clip/clipped": 1.0, "loss": 2.0}]
    >>> optaxclip.plots.plot_loss(history).lines[1].get_xdata()
    array([1])
    """
    seen = select_clip(history, clip)
    if key not in seen:
        raise ValueError(
            f"plot_loss: no {key!r} in the history: append optaxclip.metrics(state) |"
            f" {{{key!r}: loss}}."
        )
    ax, losses = axes_or_new(ax), np.where(np.isfinite(seen[key]), seen[key], np.nan)
    ax.plot(np.arange(len(losses)), losses, color=GREY, linewidth=0.9, label=key)
    _mark_clipped(
        ax, losses, _find_clipped(seen) if "clipped" in seen else np.zeros(len(losses), bool)
    )
    ax.set(xlabel="step", ylabel=key)
    draw_legend_above(ax)
    return ax


def plot_clipped_share(
    history: Recorded, ax: Any = None, *, window: int | None = None, clip: int = 0
) -> Any:
    """Draws the share of steps that were clipped, over the last `window` and since the start.

    Args:
      window: in steps; None: a twentieth of the run, at least 10.
      history, ax, clip: as for `plot_norms`.

    Raises:
      ValueError: for an empty history, or one that does not say what was clipped.

    >>> import numpy as np, optaxclip
    >>> ax = optaxclip.plots.plot_clipped_share({"clipped": np.tile([1.0, 0.0], 50)}, window=10)
    >>> float(ax.lines[0].get_ydata()[-1]), float(ax.lines[1].get_ydata()[-1])
    (0.5, 0.5)
    """
    clipped = np.nan_to_num(require(select_clip(history, clip), "clipped", "plot_clipped_share"))
    ax = axes_or_new(ax)
    window = window or max(len(clipped) // 20, 10)
    # Running sums, so that a window costs the same whatever its width.
    total = np.concatenate([[0.0], np.cumsum(clipped)])
    ends = np.arange(1, len(total))
    starts = np.maximum(ends - window, 0)
    recent = (total[ends] - total[starts]) / (ends - starts)
    ax.plot(ends - 1, recent, color=GREY, linewidth=1.2, label=f"of the last {window} steps")
    ax.plot(
        ends - 1,
        total[1:] / ends,
        color=DARK,
        linestyle="--",
        linewidth=1.2,
        label="of all steps so far",
    )
    ax.set(xlabel="step", ylabel="share clipped", ylim=(-0.03, 1.03))
    draw_legend_above(ax)
    return ax


def _find_clipped(seen: dict[str, np.ndarray]) -> np.ndarray:
    """Whether anything was clipped, at each step."""
    return (
        np.nan_to_num(seen["clipped"]) > 0
        if "clipped" in seen
        else np.zeros(len(seen["grad_norm"]), bool)
    )


def _mark_clipped(ax: Any, values: np.ndarray, clipped: np.ndarray) -> None:
    """A cross on each clipped step, or on up to 200 of them: more would only be a bar."""
    places = np.flatnonzero(clipped)
    if places.size:
        some = places[np.unique(np.linspace(0, len(places) - 1, min(len(places), 200)).astype(int))]
        label = f"clipped: {clipped.mean():.0%} of steps"
        ax.plot(some, values[some], "x", color=DARK, markersize=4, markeredgewidth=0.9, label=label)
