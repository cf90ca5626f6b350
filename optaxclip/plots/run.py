"""Plots a whole run in one figure: loss, norms, clips, layers, and what `diagnose` finds."""

from __future__ import annotations

import textwrap
from typing import Any

from optaxclip import validate
from optaxclip.monitoring.diagnose import diagnose
from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.recorded import RecordedRun, read_run, require_norms
from optaxclip.monitoring.tables import Recorded
from optaxclip.plots.axes import colors_of, import_pyplot
from optaxclip.plots.distribution import plot_layers
from optaxclip.plots.steps import plot_clipped_share, plot_loss, plot_norms

_SHOWN = 6  # signs


@validate.named
def plot_run(history: Recorded, figure: Any = None, *, clip: int = 0) -> Any:
    """Draws the loss, norms with the bound, clip share and layers, as far as recorded, in rows.

    The signs that `optaxclip.diagnose` finds are listed below, and numbered lines mark the steps at
    which they began.

    Args:
      history: as for `plot_norms`, with the loss beside the metrics if there is one.
      figure: where to draw, a figure or subfigure with a constrained layout; None: a new one.
      clip: as for `plot_norms`.

    Returns:
      The figure.

    Raises:
      ImportError: without matplotlib.
      ValueError: for an empty history, or one without norms.

    >>> import numpy as np, optaxclip
    >>> history = {"clip/grad_norm": 1.2 ** np.arange(40), "loss": np.linspace(3.0, 2.0, 40)}
    >>> [ax.get_ylabel() for ax in optaxclip.plots.plot_run(history).axes]
    ['loss', 'gradient norm']
    """
    run = read_run(history, clip, every_row=True)
    require_norms(run)
    # Read once for all plots: from the device, and from the dicts of all steps.
    history = run.table | {"step": run.steps}
    rows = _choose(run)
    # A heat map needs room for the names of its rows.
    ratios = [min(1 + 0.09 * len(run.blocks), 3) if r is plot_layers else 1 for r in rows]
    if figure is None:
        size = (9.0, 0.8 + 2.2 * sum(ratios))
        figure = import_pyplot().figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for draw, ax in zip(rows, axes, strict=True):
        draw(history, ax, clip=clip)
        ax.label_outer()
    _mark_signs(figure, axes, diagnose(history)[:_SHOWN])
    return figure


def _choose(run: RecordedRun) -> list[Any]:
    """Chooses the plots that the run has data for."""
    rows = [plot_loss] if "loss" in run.table else []
    rows += [plot_norms]
    rows += [plot_clipped_share] if "clipped" in run.clip else []
    return rows + ([plot_layers] if len(run.blocks) > 1 else [])


def _mark_signs(figure: Any, axes: Any, signs: tuple[Sign, ...]) -> None:
    """Draws lines at the steps where signs began, and lists the signs below all axes."""
    ink = colors_of(axes[0]).ink
    for number, sign in enumerate(signs, start=1):
        # Some signs concern the whole run.
        if sign.step is None:
            continue
        for ax in axes:
            ax.axvline(sign.step, color=ink, linestyle=":", linewidth=1.2, zorder=4)
        box = {"boxstyle": "circle,pad=0.2", "facecolor": axes[0].get_facecolor(), "edgecolor": ink}
        style = {"ha": "center", "va": "top", "fontsize": 8, "bbox": box, "zorder": 6}
        # Beside the line, because there may be a spike on it: on the left, but on the right near
        # the left end, where the numbers of the axis are.
        low, high = axes[0].get_xlim()
        side = -10 if sign.step - low > 0.05 * (high - low) else 10
        style |= {"xytext": (side, 0), "textcoords": "offset points"}
        # At different heights, because numbers of signs at one step would hide each other.
        at = 0.95 - 0.15 * ((number - 1) % 5)
        over = axes[0].get_xaxis_transform()
        axes[0].annotate(str(number), (sign.step, at), xycoords=over, color=ink, **style)
    lines = [f"{number} {sign.name}: {sign.what}" for number, sign in enumerate(signs, start=1)]
    text = "\n".join(textwrap.fill(line, 110, subsequent_indent="   ") for line in lines)
    # Not `figure.text`, for which the layout makes no room.
    if text:
        figure.supxlabel(text, x=0.02, ha="left", fontsize=8)
