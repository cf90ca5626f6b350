"""Plots how norms are distributed: over layers, and by size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip import validate
from optaxclip.monitoring.fits import find_runs, is_known
from optaxclip.monitoring.histograms import Histograms, log_edges
from optaxclip.monitoring.recorded import RecordedRun, read_run, require_norms
from optaxclip.monitoring.tables import Recorded, is_history
from optaxclip.plots.axes import axes_or_new, colors_of, draw_legend_above, format_ticks, name_axes

_LINES = ("-", "--", "-.", ":")
_NAMES, _LETTERS = 40, 36  # how many names at an axis, and letters of each, are readable


@validate.named
def plot_layers(history: Recorded, ax: Any = None, *, columns: int = 200, clip: int = 0) -> Any:
    """Draws the norms of all layers over the steps as a heat map, on a log scale.

    Args:
      history: as for `plot_norms`, with a watch or a clip by layer (`clip_by_leaf_norm`,
        `clip_by_group_norm`, `scope=`), or a dict of layer -> norms.
      ax: where to draw; None: a new figure, as high as the layers need.
      columns: the maximum number of columns, each the largest norm of its steps. Hatched: NaN or
        infinite; dotted: zero at all of its steps.
      clip: as for `plot_norms`.

    Raises:
      ValueError: if there are no norms by layer in the history.

    >>> import optaxclip
    >>> norms = {"clip/grad_norm/head": [1.0, 2.0], "clip/grad_norm/body": [3.0, 4.0]}
    >>> ax = optaxclip.plots.plot_layers(norms)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['head', 'body']
    """
    run = read_run(history, clip)
    layers = run.blocks or _plain_layers(run)
    if not layers:
        raise ValueError(
            "plot_layers: the history has no norms by layer: put optaxclip.watch() before the clip,"
            " or clip with scope=scopes.leaf or by group."
        )
    height = 1.2 + 0.22 * min(len(layers), _NAMES)
    ax, norms = axes_or_new(ax, 8.0, height), np.stack(list(layers.values()))
    cuts = np.linspace(0, norms.shape[1], min(columns, norms.shape[1]) + 1).astype(int)
    # The largest norm, because NaN and spikes of one step must be visible in their column.
    cells = np.maximum.reduceat(norms, cuts[:-1], axis=1)
    edges = np.r_[run.steps[cuts[:-1]] - 0.5, run.steps[-1] + 0.5]
    _draw_heat_map(ax, edges, cells)
    name_axes(ax, "")
    _name_rows(ax, list(layers))
    return ax


def _plain_layers(run: RecordedRun) -> dict[str, np.ndarray]:
    """Returns the columns of a dict of layer -> norms, which no part of a state has written."""
    return {} if run.clips or run.watches or run.skips else run.table


def _name_rows(ax: Any, names: list[str]) -> None:
    """Names the rows of a heat map, from the top; of very many only some."""
    rows = np.arange(0, len(names), -(-len(names) // _NAMES))
    ax.set_yticks(rows + 0.5, [_shorten(names[row]) for row in rows], fontsize=8)
    ax.set_ylim(len(names), 0)


def _shorten(name: str) -> str:
    """Leaves out the middle of a long name, because both ends tell layers apart."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[: half - 1]}…{name[-half:]}"


def _draw_heat_map(ax: Any, edges: np.ndarray, cells: np.ndarray) -> None:
    """Draws the cells on a log scale with a colour bar, hatched where there is no number."""
    from matplotlib.colors import LogNorm

    known, rows = is_known(cells), np.arange(len(cells) + 1)
    low, high = (cells[known].min(), cells[known].max()) if known.any() else (1.0, 1.0)
    # If all norms are equal, colours still need a range.
    scale, shown = LogNorm(low, max(high, low * 1.01)), np.where(known, cells, np.nan)
    # `cividis` has an even lightness, so it survives grey print and works for the colour-blind.
    mesh = ax.pcolormesh(edges, rows, np.ma.masked_invalid(shown), norm=scale, cmap="cividis")
    colors, hatched = colors_of(ax), {"NaN or infinite": ~np.isfinite(cells), "zero": cells == 0}
    handles = []
    for (name, cell), hatch in zip(hatched.items(), ("xxxx", "...."), strict=True):
        if cell.any():
            handles.append(_hatch(ax, edges, cell, hatch, colors.bad, name))
    if handles:
        draw_legend_above(ax, handles=handles)
    # Without any norm there are no colours to read.
    if known.any():
        bar = ax.figure.colorbar(mesh, ax=ax, label="gradient norm")
        format_ticks(bar.ax.yaxis)


def _hatch(ax: Any, edges: np.ndarray, cells: np.ndarray, hatch: str, color: str, name: str) -> Any:
    """Hatches runs of cells, and returns their entry for a legend."""
    from matplotlib.patches import Patch

    style = {"facecolor": "none", "edgecolor": color, "linewidth": 0, "hatch": hatch}
    for row, there in enumerate(cells):
        spans = [(edges[a], edges[b] - edges[a]) for a, b in find_runs(there)]
        if spans:
            ax.broken_barh(spans, (row, 1), **style)
    return Patch(label=name, **style)


@validate.named
def plot_histogram(
    norms: Any,
    ax: Any = None,
    *,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    thresholds: Sequence[float] = (),
    bins: int = 40,
) -> Any:
    """Draws a histogram of norms, with quantiles, and how much candidate thresholds would clip.

    Args:
      norms: (steps,), or a history as for `plot_norms`; or the result of
        `optaxclip.loggers.histograms`: then it shows the elements of each block, and only `ax` of
        the other arguments matters.
      ax: where to draw; None: a new figure.
      quantiles: the quantiles to mark by lines.
      thresholds: candidates; the legend says how much each would clip.
      bins: the number of bins, of equal width on a log scale.

    Raises:
      ValueError: for a history without norms, or if no norm is finite and positive.

    >>> import numpy as np, optaxclip
    >>> norms = np.geomspace(0.1, 10, 101)
    >>> ax = optaxclip.plots.plot_histogram(norms, quantiles=[0.5], thresholds=[5.0])
    >>> [line.get_label() for line in ax.lines]
    ['50% are below 1', '5 would clip 16%']
    """
    if isinstance(norms, Histograms):
        return _draw_counts(norms, axes_or_new(ax))
    if is_history(norms):
        norms = require_norms(read_run(norms, 0))
    array = np.asarray(norms, float)
    known = array[is_known(array)]
    if not known.size:
        raise ValueError("plot_histogram: no norm is finite and positive.")
    ax, low, high = axes_or_new(ax), known.min(), known.max()
    # Rounding of exact limits could exclude the smallest or the largest norm.
    edges = np.geomspace(low * 0.99, high * 1.01, bins + 1)
    color = colors_of(ax).line
    ax.hist(known, edges, color=color, alpha=0.45, edgecolor=color, linewidth=0.5)
    _mark_quantiles(ax, known, quantiles)
    # Among all finite norms: zeros are steps, too, which are never clipped.
    _mark_thresholds(ax, array[np.isfinite(array)], thresholds)
    ax.set(xscale="log", xlabel="gradient norm", ylabel="steps")
    format_ticks(ax.xaxis)
    draw_legend_above(ax, 3)
    return ax


def _mark_quantiles(ax: Any, norms: np.ndarray, quantiles: Sequence[float]) -> None:
    """Draws a line at each quantile, whose label is a share of norms."""
    for line, q in zip(itertools.cycle(_LINES), quantiles, strict=False):
        at = np.quantile(norms, q)
        label = f"{100 * q:.3g}% are below {at:.3g}"
        ax.axvline(at, color=colors_of(ax).ink, linewidth=1.0, linestyle=line, label=label)


def _mark_thresholds(ax: Any, norms: np.ndarray, thresholds: Sequence[float]) -> None:
    """Draws a line at each threshold, whose label is how many norms it would clip."""
    for marker, bound in zip(itertools.cycle("os^Dv"), thresholds, strict=False):
        label = f"{bound:.3g} would clip {np.mean(norms > bound):.0%}"
        style = {"linewidth": 2.0, "marker": marker, "markevery": [1], "markersize": 7}
        ax.axvline(bound, ymax=0.93, color=colors_of(ax).bad, label=label, **style)


def _draw_counts(found: Histograms, ax: Any) -> Any:
    """Draws the share of each block's elements in each bin, dark for few and light for many."""
    names, counts = list(found.counts), np.stack(list(found.counts.values()))
    # Shares and not counts, because an embedding has thousands of times the elements of a bias.
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    edges = log_edges(found.edges)
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1), share, cmap="cividis", vmin=0)
    ax.figure.colorbar(mesh, ax=ax, label="share of elements")
    _name_rows(ax, names)
    labels = ["0", *(f"1e{power:.0f}" for power in edges[1:-1]), "∞"]
    ax.set_xticks(edges[::2], labels[::2])
    ax.set(xlabel="|g|")
    return ax
