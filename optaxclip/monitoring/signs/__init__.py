"""One rule for each sign: what a recorded run shows, the numbers, and what to try.

Each rule is a function of a run that yields what it finds. They are in the order in which causes
come before their consequences; a sign that another one explains is not said.
"""

from __future__ import annotations

from optaxclip.monitoring.findings import Sign
from optaxclip.monitoring.history import RecordedRun
from optaxclip.monitoring.signs.clips import averaging, clipping
from optaxclip.monitoring.signs.explosions import rising
from optaxclip.monitoring.signs.kept import forgetting
from optaxclip.monitoring.signs.lost import losing, skipping
from optaxclip.monitoring.signs.progress import growing, moving
from optaxclip.monitoring.signs.small import depth, vanishing, zero
from optaxclip.monitoring.signs.spikes import spiking

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
# What is a consequence of a sign, or the same thing seen by another rule.
_EXPLAINS = {
    "norms-exploding": _BROKEN | _STOPPED | _SLOW | _CLIPS | _SIZES,
    "norms-jumped": _BROKEN | _SLOW | _CLIPS | _SIZES,
    "learning-rate-too-high": _BROKEN | _STOPPED | _SLOW | _CLIPS | _SIZES,
    "zero-gradients": _SLOW | _CLIPS | _SIZES | {"every-step-skipped", "layer-dead"},
    # Nothing is applied, so nothing moves; a clip inside the wrapper shows its last step for ever.
    "every-step-skipped": _BROKEN | _SLOW | _CLIPS,
    "norm-not-finite": _SLOW | {"spike"},
    "loss-not-finite": _SLOW | {"spike"},
    "norm-overflow": _SLOW | {"spike"},
    "layer-dead": {"loss-not-moving"},
    "norms-fall-with-depth": {"loss-not-moving"},
    "norms-vanishing": {"loss-not-moving"},
}


def find_signs(run: RecordedRun) -> list[Sign]:
    """The signs in a run, causes first, without those that another one explains."""
    # Of a state that never advances the other rules would judge numbers that mean nothing.
    if forgotten := list(forgetting(run)):
        return forgotten
    found: list[Sign] = [sign for rule in _RULES for sign in rule(run)]
    explained = {name for sign in found for name in _EXPLAINS.get(sign.name, ())}
    return [sign for sign in found if sign.name not in explained]
