"""Axes, legends and ticks for all plots."""

from __future__ import annotations

from typing import Any

GREY, DARK, LIGHT = "0.55", "black", "0.85"


def axes_or_new(ax: Any, width: float = 7.0, height: float = 3.6) -> Any:
    """The axes given, or those of a new figure.

    Raises:
      ImportError: without matplotlib, the extra `plot`.
    """
    # Imported here, since it is an extra and takes half a second.
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "optaxclip.plots needs matplotlib, which is an extra: pip install 'optaxclip[plot]'."
        ) from error

    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def draw_legend(ax: Any, **where: Any) -> None:
    """A small legend that does not hide what is behind it."""
    ax.legend(fontsize=8, framealpha=0.9, **where)


def draw_legend_above(ax: Any, columns: int = 4) -> None:
    """A legend over the axes, for plots that leave no room inside."""
    draw_legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2)


def format_ticks(axis: Any) -> None:
    """Ticks such as 0.4 on a log axis, in place of 4 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1.0, 0.5)))
