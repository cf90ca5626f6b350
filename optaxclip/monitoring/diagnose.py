"""Finds signs of exploding and vanishing gradients in a recorded run, with evidence and advice."""

from __future__ import annotations

from typing import Any

from optaxclip import validate
from optaxclip.monitoring.findings import Findings, Sign
from optaxclip.monitoring.recorded import RecordedRun, read_run, require_norms
from optaxclip.monitoring.signs.clips import averaging, clipping
from optaxclip.monitoring.signs.explosions import rising
from optaxclip.monitoring.signs.lost import forgetting, losing, skipping
from optaxclip.monitoring.signs.progress import growing, moving
from optaxclip.monitoring.signs.small import depth, vanishing, zero
from optaxclip.monitoring.signs.spikes import spiking
from optaxclip.monitoring.tables import Recorded

_RULES = (
    rising,
    zero,
    skipping,
    losing,
    averaging,
    spiking,
    depth,
    vanishing,
    moving,
    clipping,
    growing,
)
_BROKEN = {"norm-not-finite", "loss-not-finite", "norm-overflow"}
_SLOW = {"loss-not-moving", "loss-rising", "learning-rate-too-low", "weights-growing"}
_CLIPS = {"clip-always-active", "clip-never-active"}
_STOPPED = {"zero-gradients", "layer-dead", "every-step-skipped"}
_SIZES = {"spike", "spike-burst", "heavy-tail", "norms-vanishing"}
# For each sign, those that it causes, or that are the same thing seen by another rule.
_EXPLAINS = {
    "norms-exploding": _BROKEN | _STOPPED | _SLOW | _CLIPS | _SIZES,
    "norms-jumped": _BROKEN | _SLOW | _CLIPS | _SIZES,
    "learning-rate-too-high": _BROKEN | _STOPPED | _SLOW | _CLIPS | _SIZES,
    "zero-gradients": _SLOW | _CLIPS | _SIZES | {"every-step-skipped", "layer-dead"},
    # No update is applied, so nothing moves, and a clip inside the wrapper repeats its last step.
    "every-step-skipped": _BROKEN | _SLOW | _CLIPS,
    "norm-not-finite": _SLOW | {"spike"},
    "loss-not-finite": _SLOW | {"spike"},
    "norm-overflow": _SLOW | {"spike"},
    "layer-dead": {"loss-not-moving"},
    "norms-fall-with-depth": {"loss-not-moving"},
    "norms-vanishing": {"loss-not-moving"},
}


@validate.named
def diagnose(history: Recorded, *, losses: Any = None, param_norms: Any = None) -> tuple[Sign, ...]:
    """Looks for signs of exploding and vanishing gradients in a recorded run.

    The docs list the signs and the numbers that define them. Causes come first, and their
    consequences are left out. Most rules need 20 steps, some 100; with fewer it reports whether
    norms rose to NaN, and whether everything was finite. A healthy run has no signs.

    Args:
      history: what `optaxclip.metrics` returned at each step: a `History`, a sequence of dicts, or
        a dict of arrays with one entry per step, as `lax.scan` stacks them.
      losses: the loss at each step; None: the history's "loss", if it has one.
      param_norms: the norm of all parameters at each step; None: the history's "param_norm", if it
        has one.

    Returns:
      A tuple of `Sign`, empty if there are none. Print it, or one of the signs, for a report.

    Raises:
      ValueError: if the history is empty, or has no norms.

    >>> import numpy as np, optaxclip
    >>> for sign in optaxclip.diagnose({"clip/grad_norm": 1.2 ** np.arange(40)}):
    ...     print(sign.name, sorted(sign.evidence))
    norms-exploding ['doubling_steps', 'first', 'growth', 'steps', 'usual']
    """
    run = read_run(history, loss=losses, param_norm=param_norms)
    require_norms(run)
    return Findings(_find_signs(run))


def _find_signs(run: RecordedRun) -> list[Sign]:
    """Finds the signs in a run, causes first, without those that another sign explains."""
    # If the state never advances, the other rules would judge meaningless numbers.
    if forgotten := list(forgetting(run)):
        return forgotten
    found: list[Sign] = [sign for rule in _RULES for sign in rule(run)]
    explained = {name for sign in found for name in _EXPLAINS.get(sign.name, ())}
    return [sign for sign in found if sign.name not in explained]
