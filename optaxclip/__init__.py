"""Gradient clipping as Optax gradient transformations: four parts, every published way to put them together."""

from optaxclip.actions import Action, band, normalize, rescale, smooth, zero
from optaxclip.algorithms.adaptive_grad_clip import adaptive_grad_clip, unitwise_clip, unitwise_norm
from optaxclip.algorithms.global_norm import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
)
from optaxclip.algorithms.per_example import per_example_global_norm_clip, per_example_layer_norm_clip
from optaxclip.algorithms.value import clip, clip_by_value
from optaxclip.core import ClipState, clip_by
from optaxclip.norms import Norm, l1, l2, linf, lp, rms
from optaxclip.record import Metrics, metrics
from optaxclip.scopes import Scope, groups, leaf, tree, units
from optaxclip.thresholds.combine import accepted, at_least, at_most, clipped, lag, per_block, raw
from optaxclip.thresholds.fixed import constant, param_relative, scheduled, until

__version__ = "0.1.0"

__all__ = [
    "Action",
    "ClipState",
    "Metrics",
    "Norm",
    "Scope",
    "accepted",
    "adaptive_grad_clip",
    "at_least",
    "at_most",
    "band",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "clipped",
    "constant",
    "groups",
    "l1",
    "l2",
    "lag",
    "leaf",
    "linf",
    "lp",
    "metrics",
    "normalize",
    "param_relative",
    "per_block",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "raw",
    "rescale",
    "rms",
    "scheduled",
    "smooth",
    "tree",
    "units",
    "unitwise_clip",
    "unitwise_norm",
    "until",
    "zero",
]
