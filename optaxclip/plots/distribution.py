"""How norms are distributed: over layers, and by size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip.monitoring.history import (
    History,
    Recorded,
    block_norms,
    find_norms,
    require,
    select_clip,
)
from optaxclip.plots.axes import DARK, LIGHT, axes_or_new, draw_legend_above, format_ticks

LINES = ("-", "--", "-.", ":")


def plot_layers(history: Recorded, ax: Any = None, *, columns: int = 200, clip: int = 0) -> Any:
    """Draws the norms of all layers over the steps as a heat map, dark for large, on a log scale.

    Args:
      history: as for `plot_norms`, of a clip by layer (`clip_by_leaf_norm`, `clip_by_group_norm`,
        `scope=`), or a dict of layer -> norms.
      ax: where to draw; None: a new figure, as high as the layers need.
      columns: at most this many; a column is the largest norm of its steps. Hatched: NaN or
        infinite.
      clip: as for `plot_norms`.

    Raises:
      ValueError: if there are no norms by layer in the history.

    >>> import optaxclip
    >>> norms = {"clip/grad_norm/head": [1.0, 2.0], "clip/grad_norm/body": [3.0, 4.0]}
    >>> ax = optaxclip.plots.plot_layers(norms)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['head', 'body']
    """
    seen = select_clip(history, clip)
    total, layers = find_norms(seen)
    layers = layers or block_norms(seen, "watch/") or (seen if total is None else {})
    if not layers:
        raise ValueError(
            "plot_layers: no norms by layer in the history: put optaxclip.watch() before the clip,"
            " or clip with"
            " scope=scopes.leaf or by group."
        )
    ax, norms = axes_or_new(ax, 8.0, 1.2 + 0.22 * len(layers)), np.stack(list(layers.values()))
    edges = np.linspace(0, norms.shape[1], min(columns, norms.shape[1]) + 1).astype(int)
    # The largest norm, not the mean: NaN and spikes of one step must show in their column.
    cells = np.stack([norms[:, a:b].max(axis=1) for a, b in itertools.pairwise(edges)], axis=1)
    _draw_heat_map(ax, edges, cells)
    ax.set_yticks(np.arange(len(layers)) + 0.5, list(layers), fontsize=8)
    ax.set(xlabel="step", ylim=(len(layers), 0), facecolor="white")
    return ax


def _draw_heat_map(ax: Any, edges: np.ndarray, cells: np.ndarray) -> None:
    """The cells on a log scale, with a colour bar; hatched where there is no number."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    known = np.isfinite(cells) & (cells > 0)
    low, high = (cells[known].min(), cells[known].max()) if known.any() else (1.0, 1.0)
    back = Rectangle(
        (0, 0),
        edges[-1],
        len(cells),
        fill=False,
        hatch="xxxx",
        linewidth=0,
        zorder=0,
        edgecolor=DARK,
    )
    ax.add_patch(back)
    rows = np.arange(len(cells) + 1)
    scale = LogNorm(low, max(high, low * 1.01))
    mesh = ax.pcolormesh(
        edges,
        rows,
        np.where(known, cells, np.where(cells == 0, low, np.nan)),
        norm=scale,
        cmap="Greys",
    )
    ax.figure.colorbar(mesh, ax=ax, label="gradient norm")


def plot_histogram(
    norms: Any,
    ax: Any = None,
    *,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    thresholds: Sequence[float] = (),
    bins: int = 40,
) -> Any:
    """Draws a histogram of norms, with quantiles, and what candidate thresholds would clip.

    Args:
      norms: (steps,), or a history as for `plot_norms`.
      ax: where to draw; None: a new figure.
      quantiles: marked by lines.
      thresholds: candidates; what each clips is in the legend.
      bins: of equal width on a log scale.

    Raises:
      ValueError: for a history without norms; if no norm is finite and over zero.

    >>> import numpy as np, optaxclip
    >>> norms = np.geomspace(0.1, 10, 101)
    >>> ax = optaxclip.plots.plot_histogram(norms, quantiles=[0.5], thresholds=[5.0])
    >>> [line.get_label() for line in ax.lines]
    ['50% are below 1', '5 would clip 16%']
    """
    if _is_history(norms):
        seen = select_clip(norms)
        norms = find_norms(seen)[0]
        norms = require(seen, "grad_norm", "plot_histogram") if norms is None else norms
    array = np.asarray(norms, float)
    known = array[np.isfinite(array) & (array > 0)]
    if not known.size:
        raise ValueError("plot_histogram: no norm is finite and over zero.")
    ax, low, high = axes_or_new(ax), known.min(), known.max()
    edges = np.geomspace(low * 0.99, high * 1.01, bins + 1)
    ax.hist(known, edges, color=LIGHT, edgecolor="0.5", linewidth=0.5)
    for line, q in zip(itertools.cycle(LINES), quantiles, strict=False):
        at = np.quantile(known, q)
        ax.axvline(
            at,
            color=DARK,
            linewidth=1.0,
            linestyle=line,
            label=f"{100 * q:.3g}% are below {at:.3g}",
        )
    for marker, bound in zip(itertools.cycle("os^Dv"), thresholds, strict=False):
        share = np.mean(array[np.isfinite(array)] > bound)
        label = f"{bound:.3g} would clip {share:.0%}"
        style = {"linewidth": 2.0, "marker": marker, "markevery": [1], "markersize": 7}
        ax.axvline(bound, ymax=0.93, color="0.35", label=label, **style)
    ax.set(xscale="log", xlabel="gradient norm", ylabel="steps")
    format_ticks(ax.xaxis)
    draw_legend_above(ax, 3)
    return ax


def _is_history(norms: Any) -> bool:
    return (
        hasattr(norms, "keys")
        or isinstance(norms, History)
        or (isinstance(norms, list | tuple) and bool(norms) and hasattr(norms[0], "keys"))
    )
