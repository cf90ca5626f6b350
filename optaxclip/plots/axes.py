"""Axes, colours, legends and marks for all plots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from optaxclip.monitoring.display import format_share
from optaxclip.monitoring.fits import find_runs, is_known

GREY, DARK = "0.55", "black"
_BINS = 200  # of a band; more are not visible
_BAND = 0.12  # its height, as a fraction of the axes


class Colors(NamedTuple):
    """Colours for colour-blind people too (after Okabe and Ito), which also differ in grey."""

    ink: str
    line: str
    clip: str
    bad: str


def colors_of(ax: Any) -> Colors:
    """Returns colours for the background of the axes, which a style may have made dark."""
    from matplotlib.colors import to_rgb

    dark = np.dot(to_rgb(ax.get_facecolor()), (0.3, 0.6, 0.1)) < 0.5
    return Colors("white", "#56B4E9", "#B87A00", "#FFB090") if dark else _ON_WHITE


_ON_WHITE = Colors("black", "#0072B2", "#E69F00", "#882000")


def axes_or_new(ax: Any, width: float = 7.0, height: float = 3.6) -> Any:
    """Returns the given axes, or those of a new figure.

    Raises:
      ImportError: without matplotlib, which the extra `plot` installs.
    """
    plt = import_pyplot()
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def import_pyplot() -> Any:
    """Imports matplotlib, which is an extra and takes half a second."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "optaxclip.plots needs matplotlib, which is an extra: pip install 'optaxclip[plot]'."
        ) from error
    return plt


def draw_over_steps(ax: Any, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draws a line that is broken at NaN; a number between two NaNs is a dot."""
    gaps = np.r_[True, np.isnan(values), True]
    alone = np.flatnonzero(~gaps[1:-1] & gaps[:-2] & gaps[2:]).tolist()
    ax.plot(steps, values, linewidth=1.0, marker="." if alone else None, markevery=alone, **style)


def positive(values: np.ndarray) -> np.ndarray:
    """Returns what has a place on a log axis, and NaN for everything else."""
    return np.where(is_known(values), values, np.nan)


def draw_dashed(ax: Any, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """Draws a dashed line in the colour of the text, for what is compared with the rest."""
    style = {"color": colors_of(ax).ink, "linestyle": "--", "linewidth": 1.2}
    ax.plot(steps, values, label=label, **style)


def name_axes(ax: Any, ylabel: str, **more: Any) -> None:
    """Names both axes, and puts no tick between two steps."""
    ax.set(xlabel="step", ylabel=ylabel, **more)
    ax.locator_params("x", integer=True, min_n_ticks=1)


def draw_legend_above(ax: Any, columns: int = 4, **what: Any) -> None:
    """Draws a legend above the axes, where it hides nothing."""
    where = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(fontsize=8, framealpha=0.9, ncols=columns, **where, **what)


def draw_bad(ax: Any, steps: np.ndarray, bad: np.ndarray) -> None:
    """Marks runs of bad steps: shaded and hatched, with a triangle where each begins."""
    if not bad.any():
        return
    color, runs = colors_of(ax).bad, np.array(find_runs(bad))
    starts, ends = steps[runs[:, 0]], steps[runs[:, 1] - 1]
    spans = np.stack([starts - 0.5, ends - starts + 1.0], axis=1)
    style = {"hatch": "////", "linewidth": 0.8, "edgecolor": color, "facecolor": "none"}
    label, over = f"NaN or infinite: {_count(bad.sum())}", ax.get_xaxis_transform()
    # The edge is always drawn: one step of 10,000 is narrower than a pixel.
    ax.broken_barh(spans, (0, 1), transform=over, zorder=0.5, alpha=0.6, **style)
    mark = {"color": color, "markersize": 6, "linestyle": "", "clip_on": False, "label": label}
    ax.plot(starts, np.ones(len(starts)), "v", transform=over, zorder=5, **mark)


def draw_clipped(ax: Any, steps: np.ndarray, clipped: np.ndarray) -> None:
    """Draws a band below the lines, as high as the share of steps clipped around each step."""
    # NaN is a step at which it was not recorded.
    known = np.isfinite(clipped)
    steps, share = steps[known], clipped[known]
    if not share.any():
        return
    # Bins, because one bar per step would be slow, and would blur to the highest.
    edges = np.linspace(0, len(steps), min(len(steps), _BINS) + 1).astype(int)
    heights = np.add.reduceat(share, edges[:-1]) / np.diff(edges)
    limits = np.r_[steps[edges[:-1]] - 0.5, steps[-1] + 0.5]
    label = f"clipped: {format_share(share.mean())} of steps"
    _make_room(ax)
    ax.stairs(
        _BAND * heights,
        limits,
        fill=True,
        transform=ax.get_xaxis_transform(),
        color=colors_of(ax).clip,
        zorder=0.7,
        label=label,
    )


def _make_room(ax: Any) -> None:
    """Lowers the lower limit by the height of the band, on any scale."""
    # In the units of the scale, because on a log axis a share of the height is a factor.
    scale, (low, high) = ax.yaxis.get_transform(), ax.get_ylim()
    bottom, top = scale.transform([low, high])
    room = (top - bottom) * _BAND / (1 - _BAND)
    ax.set_ylim(scale.inverted().transform([bottom - room])[0], high)


def _count(n: int) -> str:
    return f"{n} step" if n == 1 else f"{n} steps"


def format_ticks(axis: Any) -> None:
    """Formats ticks on a log axis as 0.4 instead of 4 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    # Shown only on less than a decade, where at most one major tick gives a number.
    axis.set_minor_formatter(Plain(minor_thresholds=(1.0, 0.5)))
