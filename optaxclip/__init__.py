"""Gradient clipping as Optax gradient transformations: four parts, every published way to put them together."""

from optaxclip import plots
from optaxclip.actions import Action, band, normalize, rescale, smooth, zero
from optaxclip.algorithms.acclip import scale_by_acclip
from optaxclip.algorithms.adagc import adagc
from optaxclip.algorithms.adaptive_grad_clip import adaptive_grad_clip, unitwise_clip, unitwise_norm
from optaxclip.algorithms.autoclip import autoclip
from optaxclip.algorithms.band_clip import band_clip
from optaxclip.algorithms.clip_qk import clip_qk
from optaxclip.algorithms.clipped_grad import ClippedExamples, clipped_value_and_grad, ghost_parameters
from optaxclip.algorithms.clippy import clippy
from optaxclip.algorithms.global_norm import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
)
from optaxclip.algorithms.larc import larc
from optaxclip.algorithms.log_zscore import clip_by_log_zscore
from optaxclip.algorithms.median import clip_by_median
from optaxclip.algorithms.momentum_norm import clip_by_momentum_norm
from optaxclip.algorithms.norm_growth import limit_norm_growth
from optaxclip.algorithms.per_example import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
    per_example_normalize,
)
from optaxclip.algorithms.quantile_clip import quantile_clip
from optaxclip.algorithms.reset_moments import reset_moments
from optaxclip.algorithms.second_moment import adamw_clip, spam_clip
from optaxclip.algorithms.smooth_clip import smooth_clip
from optaxclip.algorithms.spectral_clip import spectral_clip
from optaxclip.algorithms.stable_adamw import scale_by_stable_rms, stable_adamw
from optaxclip.algorithms.stable_spam import clip_by_running_max, normalize_by_moments, stable_spam
from optaxclip.algorithms.u_clip import clip21, u_clip
from optaxclip.algorithms.value import clip, clip_by_value
from optaxclip.algorithms.zclip import zclip
from optaxclip.checking.check import Finding, check
from optaxclip.core import ClipState, clip_by
from optaxclip.history import History
from optaxclip.norms import Norm, l1, l2, linf, lp, rms
from optaxclip.record import Metrics, metrics
from optaxclip.scopes import Scope, groups, leaf, tree, units
from optaxclip.thresholds.combine import accepted, at_least, at_most, clipped, lag, per_block, raw
from optaxclip.thresholds.fixed import constant, param_relative, scheduled, until
from optaxclip.thresholds.learned import Statistic, learned
from optaxclip.thresholds.quantile import median, percentile, quantile, window_zscore
from optaxclip.thresholds.running import log_zscore, previous, running, zscore
from optaxclip.tuning.recommend import Recommendation, recommend
from optaxclip.tuning.sweep import Sweep
from optaxclip.tuning.training import tune
from optaxclip.watching.bad import BadStep, bad_steps
from optaxclip.watching.diagnose import Sign, diagnose
from optaxclip.watching.explain import explain
from optaxclip.watching.state import WatchState
from optaxclip.watching.watch import watch
from optaxclip.wrappers import skip_nonfinite, skip_spikes

__version__ = "0.1.0"

__all__ = [
    "Action",
    "BadStep",
    "ClipState",
    "ClippedExamples",
    "Finding",
    "History",
    "Metrics",
    "Norm",
    "Recommendation",
    "Scope",
    "Sign",
    "Statistic",
    "Sweep",
    "WatchState",
    "accepted",
    "adagc",
    "adamw_clip",
    "adaptive_grad_clip",
    "at_least",
    "at_most",
    "autoclip",
    "bad_steps",
    "band",
    "band_clip",
    "check",
    "clip",
    "clip21",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_log_zscore",
    "clip_by_median",
    "clip_by_momentum_norm",
    "clip_by_running_max",
    "clip_by_value",
    "clip_qk",
    "clipped",
    "clipped_value_and_grad",
    "clippy",
    "constant",
    "diagnose",
    "explain",
    "ghost_parameters",
    "groups",
    "l1",
    "l2",
    "lag",
    "larc",
    "leaf",
    "learned",
    "limit_norm_growth",
    "linf",
    "log_zscore",
    "lp",
    "median",
    "metrics",
    "normalize",
    "normalize_by_moments",
    "param_relative",
    "per_block",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "per_example_normalize",
    "percentile",
    "plots",
    "previous",
    "quantile",
    "quantile_clip",
    "raw",
    "recommend",
    "rescale",
    "reset_moments",
    "rms",
    "running",
    "scale_by_acclip",
    "scale_by_stable_rms",
    "scheduled",
    "skip_nonfinite",
    "skip_spikes",
    "smooth",
    "smooth_clip",
    "spam_clip",
    "spectral_clip",
    "stable_adamw",
    "stable_spam",
    "tree",
    "tune",
    "u_clip",
    "units",
    "unitwise_clip",
    "unitwise_norm",
    "until",
    "watch",
    "window_zscore",
    "zclip",
    "zero",
    "zscore",
]
