"""Gradient clipping as Optax gradient transformations: four parts, and published methods
made of them.

At the top lie what users chain and call. Parts lie in namespaces that say what they are:
`scopes.leaf`, `norms.l2`, `actions.zero`, `thresholds.zscore`, `feeds.accepted`; types of parts and
states in `base`.
"""

import difflib
import functools
import sys
from types import ModuleType
from typing import NoReturn

from optaxclip import (
    actions,
    aggregation,
    base,
    feeds,
    monitoring,
    norms,
    per_example,
    plots,
    scopes,
    thresholds,
    wrappers,
)
from optaxclip.checking.check import check
from optaxclip.clips.acclip import scale_by_acclip
from optaxclip.clips.adagc import adagc
from optaxclip.clips.adaptive_grad_clip import adaptive_grad_clip, unitwise_clip, unitwise_norm
from optaxclip.clips.autoclip import autoclip
from optaxclip.clips.band_clip import band_clip
from optaxclip.clips.block_rms import clip_by_block_rms
from optaxclip.clips.clip_qk import clip_qk
from optaxclip.clips.clippy import clippy
from optaxclip.clips.larc import larc
from optaxclip.clips.log_zscore import clip_by_log_zscore
from optaxclip.clips.median import clip_by_median
from optaxclip.clips.momentum_norm import clip_by_momentum_norm
from optaxclip.clips.norm import (
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    global_norm,
)
from optaxclip.clips.norm_growth import limit_norm_growth
from optaxclip.clips.quantile_clip import quantile_clip
from optaxclip.clips.second_moment import adamw_clip, spam_clip
from optaxclip.clips.smooth_clip import smooth_clip
from optaxclip.clips.spectral_clip import spectral_clip
from optaxclip.clips.stable_spam import clip_by_running_max, normalize_by_moments
from optaxclip.clips.u_clip import clip21, u_clip
from optaxclip.clips.value import clip, clip_by_value
from optaxclip.clips.zclip import zclip
from optaxclip.core import clip_by
from optaxclip.monitoring import loggers
from optaxclip.monitoring.diagnose import diagnose
from optaxclip.monitoring.explain import explain
from optaxclip.monitoring.history import History
from optaxclip.monitoring.reading import metrics
from optaxclip.monitoring.report import report
from optaxclip.monitoring.watch import watch
from optaxclip.per_example import (
    clipped_value_and_grad,
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)
from optaxclip.tuning.recommend import recommend
from optaxclip.tuning.training import tune
from optaxclip.wrappers.reset_moments import reset_moments
from optaxclip.wrappers.skip import skip_nonfinite, skip_spikes
from optaxclip.wrappers.stable_adamw import scale_by_stable_rms, stable_adamw
from optaxclip.wrappers.stable_spam import stable_spam

__version__ = "0.1.0"

_NAMESPACES = (
    actions,
    aggregation,
    base,
    feeds,
    loggers,
    monitoring,
    norms,
    per_example,
    plots,
    scopes,
    thresholds,
    wrappers,
)

__all__ = [
    "History",
    "actions",
    "adagc",
    "adamw_clip",
    "adaptive_grad_clip",
    "aggregation",
    "autoclip",
    "band_clip",
    "base",
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
    "clipped_value_and_grad",
    "clippy",
    "diagnose",
    "explain",
    "feeds",
    "global_norm",
    "larc",
    "limit_norm_growth",
    "loggers",
    "metrics",
    "monitoring",
    "normalize_by_moments",
    "norms",
    "per_example",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "plots",
    "quantile_clip",
    "recommend",
    "report",
    "reset_moments",
    "scale_by_acclip",
    "scale_by_stable_rms",
    "scopes",
    "skip_nonfinite",
    "skip_spikes",
    "smooth_clip",
    "spam_clip",
    "spectral_clip",
    "stable_adamw",
    "stable_spam",
    "thresholds",
    "tune",
    "u_clip",
    "unitwise_clip",
    "unitwise_norm",
    "watch",
    "wrappers",
    "zclip",
]


# What other libraries call it, where the spelling leads elsewhere.
_CALLED_ELSEWHERE = {
    "clip_grad_norm_": "clip_by_global_norm",
    "clip_grad_norm": "clip_by_global_norm",
    "clip_grad_value_": "clip_by_value",
    "clip_by_norm": "clip_by_leaf_norm",
    "apply_if_finite": "skip_nonfinite",
}


def _misspelt(here: ModuleType, name: str) -> NoReturn:
    """An error that says where the name is, or which is the nearest."""
    names = vars(here).get("__all__", vars(here))
    rooms = [room for room in _NAMESPACES if name in vars(room)]
    near = difflib.get_close_matches(_CALLED_ELSEWHERE.get(name, name), names, n=1)
    hint = f": did you mean {here.__name__}.{near[0]}?" if near else ""
    if not name.startswith("_") and (rooms or name in __all__):
        hint = f": write {rooms[0].__name__ if rooms else __name__}.{name}"
    raise AttributeError(f"{here.__name__} has no {name!r}{hint}")


# Set and not defined: of a module with a `__getattr__` type checkers believe that it has any name.
for _room in (sys.modules[__name__], *_NAMESPACES):
    setattr(_room, "__getattr__", functools.partial(_misspelt, _room))  # noqa: B010
