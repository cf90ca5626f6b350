"""Wrappers that must hold the optimizer, because they skip or reset whole optimizer steps."""

from optaxclip.wrappers.clip_params import clip_params
from optaxclip.wrappers.loss_scale import LossScaleState, dynamic_loss_scale
from optaxclip.wrappers.reset_moments import reset_moments
from optaxclip.wrappers.skip import skip_nonfinite, skip_spikes
from optaxclip.wrappers.spectra import spectra
from optaxclip.wrappers.stable_adamw import scale_by_stable_rms, stable_adamw
from optaxclip.wrappers.stable_spam import stable_spam
from optaxclip.wrappers.steps import SkipState

__all__ = [
    "LossScaleState",
    "SkipState",
    "clip_params",
    "dynamic_loss_scale",
    "reset_moments",
    "scale_by_stable_rms",
    "skip_nonfinite",
    "skip_spikes",
    "spectra",
    "stable_adamw",
    "stable_spam",
]
