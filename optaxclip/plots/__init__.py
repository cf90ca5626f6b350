"""Plots of what clipping does. They need matplotlib: `pip install 'optaxclip[plot]'`.

It is imported when a plot is drawn. Each plot takes `ax=` (None: a new figure) and returns the axes
that it drew on; nothing is shown, saved or closed. Colour-blind people can tell the colours apart,
and plots are legible in black and white: things that differ in colour also differ in line, marker
or hatch. In a dark style the colours are light.
"""

from optaxclip.plots.cliff import plot_cliff
from optaxclip.plots.distribution import plot_histogram, plot_layers
from optaxclip.plots.run import plot_run
from optaxclip.plots.steps import plot_bound, plot_clipped_share, plot_loss, plot_norms
from optaxclip.plots.sweep import plot_sweep

__all__ = [
    "plot_bound",
    "plot_clipped_share",
    "plot_cliff",
    "plot_histogram",
    "plot_layers",
    "plot_loss",
    "plot_norms",
    "plot_run",
    "plot_sweep",
]
