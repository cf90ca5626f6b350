"""Gradient clipping as Optax gradient transformations: four parts, and the published methods made of them."""

import difflib
import importlib
from typing import Any

# INTERIM while rooms are being moved: what cannot be imported yet is left out.
_NAMES = {
    "optaxclip.core": ["clip_by"],
    "optaxclip.clips.norm": ["clip_by_block_rms", "clip_by_global_norm", "clip_by_group_norm", "clip_by_leaf_norm", "global_norm"],
    "optaxclip.clips.value": ["clip", "clip_by_value"],
    "optaxclip.clips.adaptive_grad_clip": ["adaptive_grad_clip", "unitwise_clip", "unitwise_norm"],
    "optaxclip.clips.adagc": ["adagc"],
    "optaxclip.clips.autoclip": ["autoclip"],
    "optaxclip.clips.band_clip": ["band_clip"],
    "optaxclip.clips.clip_qk": ["clip_qk"],
    "optaxclip.clips.clippy": ["clippy"],
    "optaxclip.clips.larc": ["larc"],
    "optaxclip.clips.log_zscore": ["clip_by_log_zscore"],
    "optaxclip.clips.median": ["clip_by_median"],
    "optaxclip.clips.momentum_norm": ["clip_by_momentum_norm"],
    "optaxclip.clips.norm_growth": ["limit_norm_growth"],
    "optaxclip.clips.quantile_clip": ["quantile_clip"],
    "optaxclip.clips.second_moment": ["adamw_clip", "spam_clip"],
    "optaxclip.clips.smooth_clip": ["smooth_clip"],
    "optaxclip.clips.spectral_clip": ["spectral_clip"],
    "optaxclip.clips.stable_spam": ["clip_by_running_max", "normalize_by_moments"],
    "optaxclip.wrappers.stable_spam": ["stable_spam"],
    "optaxclip.clips.u_clip": ["clip21", "u_clip"],
    "optaxclip.clips.acclip": ["scale_by_acclip"],
    "optaxclip.clips.zclip": ["zclip"],
    "optaxclip.wrappers.skip": ["skip_nonfinite", "skip_spikes"],
    "optaxclip.wrappers.reset_moments": ["reset_moments"],
    "optaxclip.wrappers.stable_adamw": ["scale_by_stable_rms", "stable_adamw"],
    "optaxclip.per_example.transforms": ["per_example_global_norm_clip", "per_example_layer_norm_clip"],
    "optaxclip.per_example.clipped_grad": ["clipped_value_and_grad"],
    "optaxclip.monitoring.reading": ["metrics"],
    "optaxclip.monitoring.watch": ["watch"],
    "optaxclip.monitoring.history": ["History"],
    "optaxclip.monitoring.bad": ["bad_steps"],
    "optaxclip.monitoring.explain": ["explain"],
    "optaxclip.monitoring.diagnose": ["diagnose"],
    "optaxclip.checking.check": ["check"],
    "optaxclip.tuning.training": ["tune"],
    "optaxclip.tuning.recommend": ["recommend"],
}
for _module in ("actions", "feeds", "norms", "scopes", "thresholds", "per_example", "plots"):
    try:
        globals()[_module] = importlib.import_module(f"optaxclip.{_module}")
    except ImportError as _e:
        pass
for _module, _names in _NAMES.items():
    try:
        _m = importlib.import_module(_module)
    except ImportError as _e:
        continue
    for _n in _names:
        globals()[_n] = getattr(_m, _n)

__version__ = "0.1.0"
