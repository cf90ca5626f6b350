"""How long a block may be: thresholds are optax transformations of norms into bounds.

A plain number means `constant`, a function of the step `scheduled`, wherever a threshold is taken.
`optax.chain`, `optax.ema`, `optax.scale` and all others work on thresholds unchanged.
"""

from optaxclip.thresholds.blocks import per_block
from optaxclip.thresholds.by_name import by_name
from optaxclip.thresholds.combine import at_least, at_most, lag, param_relative, until
from optaxclip.thresholds.fixed import constant, scheduled
from optaxclip.thresholds.learned import Statistic, learned
from optaxclip.thresholds.norm_ratio import norm_ratio
from optaxclip.thresholds.quantile import quantile
from optaxclip.thresholds.running import log_zscore, previous, running, zscore
from optaxclip.thresholds.window import median, percentile, window_zscore

__all__ = [
    "Statistic",
    "at_least",
    "at_most",
    "by_name",
    "constant",
    "lag",
    "learned",
    "log_zscore",
    "median",
    "norm_ratio",
    "param_relative",
    "per_block",
    "percentile",
    "previous",
    "quantile",
    "running",
    "scheduled",
    "until",
    "window_zscore",
    "zscore",
]
