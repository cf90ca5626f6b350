"""The table: every clip and part, one line each. An entry here is enrolled in every law of
`test_contract.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaxclip as oc


class Case(NamedTuple):
    """One clip.

    Attributes:
      name: what the test reports call it.
      make: the clip with a given bound; further keyword arguments go to the clip.
      block: "tree", "leaf", "layer", "unit" or "element": what shares one norm.
      hard: whether blocks within the bound are left alone, and others shortened to it.
      norm: of which p-norm (or "rms") the bound is.
      relative: the bound is a share of the parameters' norm, so parameters are needed.
      history: the threshold has a state.
    """

    name: str
    make: Callable[..., Any]
    block: str = "tree"
    hard: bool = True
    norm: Any = 2
    relative: bool = False
    history: bool = False

    @property
    def units(self) -> bool:
        """Whether its scope is `units`, whose norms may be no larger than 1e36."""
        return (
            self.block == "unit"
            or "units" in self.name
            or self.name.startswith("adaptive_grad_clip")
        )


def by(threshold=lambda bound: bound, **parts):
    """`clip_by` with these parts."""
    return lambda bound, **more: oc.clip_by(threshold(bound), **parts, **more)


def no_bound(norm, state):
    return jnp.full_like(norm, jnp.inf), norm


def no_bounds(norms, params):
    return jax.tree.map(lambda norm: jnp.full_like(norm, jnp.inf), norms)


def longest(norm, state):
    state = jnp.maximum(norm, state)
    return state, state


def last(norm, state):
    return 2 * norm, norm


CASES = [
    Case("clip_by_global_norm", oc.clip_by_global_norm),
    Case("clip_by_global_norm p=1", lambda b, **k: oc.clip_by_global_norm(b, norm=1, **k), norm=1),
    Case("clip_by_global_norm p=3", lambda b, **k: oc.clip_by_global_norm(b, norm=3, **k), norm=3),
    Case(
        "clip_by_global_norm p=inf",
        lambda b, **k: oc.clip_by_global_norm(b, norm=jnp.inf, **k),
        norm=jnp.inf,
    ),
    Case("clip_by_leaf_norm", oc.clip_by_leaf_norm, "leaf"),
    Case(
        "clip_by_group_norm",
        lambda b, **k: oc.clip_by_group_norm(b, lambda path: path, **k),
        "leaf",
    ),
    Case("clip_by_block_rms", oc.clip_by_block_rms, "leaf", norm="rms"),
    Case("clip", lambda b, nonfinite=None, **k: oc.clip(b, **k), "element"),
    Case("clip_by whole leaves as units", by(scope=oc.scopes.units(...)), "leaf"),
    Case("clip_by units", by(scope=oc.scopes.units()), "unit"),
    # The path of a bare array is "".
    Case("clip_by stacked", by(scope=oc.scopes.stacked("^$|kernel")), "layer"),
    Case("clip_by elements", by(scope=oc.scopes.element), "element"),
    Case("clip_by normalize", by(action=oc.actions.normalize), hard=False),
    Case(
        "clip_by smooth",
        by(action=oc.actions.smooth(2.0), scope=oc.scopes.leaf),
        "leaf",
        hard=False,
    ),
    Case(
        "clip_by smooth p=inf", by(action=oc.actions.smooth(jnp.inf), scope=oc.scopes.leaf), "leaf"
    ),
    Case("clip_by band", by(action=oc.actions.band(0.5)), hard=False),
    Case("clip_by zero", by(action=oc.actions.zero, scope=oc.scopes.leaf), "leaf", hard=False),
    Case("constant", by(oc.thresholds.constant)),
    Case("scheduled", by(lambda b: oc.thresholds.scheduled(lambda step: b)), history=True),
    Case(
        "until",
        by(lambda b: oc.thresholds.until(3, b, b), scope=oc.scopes.leaf),
        "leaf",
        history=True,
    ),
    Case("at_least", by(lambda b: oc.thresholds.at_least(b, 0.0))),
    Case(
        "at_most", by(lambda b: oc.thresholds.at_most(jnp.inf, b), scope=oc.scopes.units()), "unit"
    ),
    Case(
        "at_most lag",
        by(lambda b: oc.thresholds.at_most(oc.thresholds.lag(optax.stateless(no_bounds)), b)),
        history=True,
    ),
    Case(
        "per_block",
        by(
            lambda b: oc.thresholds.at_most(oc.thresholds.per_block(0.0, no_bound), b),
            scope=oc.scopes.leaf,
        ),
        "leaf",
        history=True,
    ),
    Case("adaptive_grad_clip", oc.adaptive_grad_clip, "unit", relative=True),
    Case(
        "adaptive_grad_clip leaves",
        lambda b, **k: oc.adaptive_grad_clip(b, axis=..., **k),
        "leaf",
        relative=True,
    ),
    Case(
        "param_relative",
        by(lambda b: oc.thresholds.param_relative(b, 1e-3), scope=oc.scopes.leaf),
        "leaf",
        relative=True,
    ),
]
HARD = [case for case in CASES if case.hard]


class Adaptive(NamedTuple):
    """One clip whose threshold learns.

    Attributes:
      name: what the test reports call it.
      make: the clip; keyword arguments (scope, nonfinite, exclude ...) go to it.
      within: after a spike, a run of NaN, a lasting change of scale ... its bound is near that of a
        run without, after this many steps at most.
      relative: its bound does not depend on the scale of the gradients.
    """

    name: str
    make: Callable[..., Any]
    within: int
    relative: bool = False


def lingvo(**more):
    """The threshold of Lingvo's GradNormTracker, with a shorter warm-up."""
    rule = {"update_first": False, "target": "threshold", "feed": oc.feeds.clipped}
    return oc.thresholds.log_zscore(4.0, 0.995, warmup_steps=60, **rule, **more)


def learning(threshold):
    """`clip_by` with this threshold."""
    return lambda **parts: oc.clip_by(threshold(), **parts)


def with_parts(algorithm, *args, **own):
    """A named algorithm with these arguments."""
    return lambda **parts: algorithm(*args, **own, **parts)


ADAPTIVE = [
    Adaptive(
        "lag",
        learning(lambda: oc.thresholds.lag(oc.thresholds.per_block(0.0, last), feed=oc.feeds.raw)),
        1,
    ),
    Adaptive("running", learning(lambda: oc.thresholds.running(2.0)), 900),
    Adaptive("norm_ratio", learning(oc.thresholds.norm_ratio), 300),
    Adaptive("running raw", learning(lambda: oc.thresholds.running(1.0, feed=oc.feeds.raw)), 900),
    Adaptive(
        "running accepted",
        learning(lambda: oc.thresholds.running(feed=oc.feeds.accepted, relearn_after=50)),
        900,
    ),
    Adaptive("window_zscore", learning(oc.thresholds.window_zscore), 130),
    Adaptive("previous", learning(lambda: oc.thresholds.previous(1.1)), 50),
    Adaptive("autoclip", with_parts(oc.autoclip, window=100), 100),
    Adaptive(
        "autoclip after", with_parts(oc.autoclip, 95.0, 100, update_first=False, max_norm=1e9), 100
    ),
    Adaptive("zclip", oc.zclip, 900),
    Adaptive("zclip mean", with_parts(oc.zclip, target="mean"), 900),
    Adaptive("clip_by_log_zscore", oc.clip_by_log_zscore, 100),
    Adaptive(
        "clip_by_log_zscore after",
        with_parts(oc.clip_by_log_zscore, 3.0, update_first=False, warmup_steps=25),
        130,
    ),
    Adaptive("adagc", oc.adagc, 7500),
    Adaptive(
        "adagc relearning",
        with_parts(
            oc.adagc, decay=0.9, ratio=1.5, max_norm=jnp.inf, relearn_after=50, warmup_steps=10
        ),
        120,
    ),
    Adaptive("quantile_clip", oc.quantile_clip, 50),
    Adaptive("quantile_clip first", with_parts(oc.quantile_clip, 0.9, init=None), 800),
    Adaptive("clip_by_median", oc.clip_by_median, 100),
    Adaptive("limit_norm_growth", oc.limit_norm_growth, 400),
    Adaptive("clip_by_momentum_norm", oc.clip_by_momentum_norm, 120),
    Adaptive("band_clip", oc.band_clip, 2200),
    Adaptive("normalize_by_moments", oc.normalize_by_moments, 250, relative=True),
    Adaptive("u_clip", with_parts(oc.u_clip, oc.thresholds.percentile(50.0, window=100)), 200),
    Adaptive("clip21", with_parts(oc.clip21, oc.thresholds.running(2.0)), 1500),
]


# Transformations that are not made from a threshold. The laws of states and poison hold for them
# and for `HOLDERS`, too.
OTHERS = {
    "spam_clip": lambda: oc.spam_clip(warmup_steps=1, every=2),
    "adamw_clip": lambda: oc.adamw_clip(warmup_steps=1),
    "clippy": oc.clippy,
    "smooth_clip": lambda: oc.smooth_clip(1.0, 4.0),
    "clip_by_running_max": oc.clip_by_running_max,
    "scale_by_acclip": oc.scale_by_acclip,
    "clip_by_median by params": lambda: oc.clip_by_median(scale_by_params=True),
    "spectral_clip": lambda: oc.spectral_clip(1.0),
    "spectral_clip adaptive": lambda: oc.spectral_clip(oc.thresholds.running(2.0), method="soft"),
    "u_clip by element": lambda: oc.u_clip(1.0, scope=oc.scopes.element),
}


def _are_matrices(params):
    return jax.tree.map(lambda p: getattr(p, "ndim", 0) > 1, params)


# These contain a transformation of Optax, and accept the trees that it accepts.
HOLDERS = {
    "larc": lambda: oc.larc(0.1, weight_decay=0.01),
    "larc by mask": lambda: oc.larc(0.1, weight_decay=0.01, mask=_are_matrices),
    "reset_moments": lambda: oc.skip_nonfinite(
        oc.reset_moments(optax.trace(0.9), every=2, warmup_steps=1)
    ),
    "skip_spikes": lambda: oc.skip_spikes(optax.trace(0.9)),
    "skip_nonfinite": lambda: oc.skip_nonfinite(optax.trace(0.9)),
    "clip_params": lambda: oc.wrappers.clip_params(oc.clip_by_leaf_norm(1.0)),
    "dynamic_loss_scale": lambda: oc.wrappers.dynamic_loss_scale(optax.trace(0.9), 1.0),
}


# Every row, ready to be built: the laws of building, trees and states hold for all of them.
ROWS: dict[str, Callable[[], Any]] = {
    **{case.name: lambda make=case.make: make(1.0) for case in CASES},
    **{case.name: case.make for case in ADAPTIVE},
    **OTHERS,
    **HOLDERS,
    # All leaves stack layers, because the trees of these laws have other names.
    "clip_by stacked": lambda: oc.clip_by(1.0, scope=oc.scopes.stacked("")),
    "watch": oc.watch,
    "clip that measures": lambda: oc.clip(1.0, measure=True),
    "clip_by_value": lambda: oc.clip_by_value(-1.0, 2.0),
    "stable_adamw": lambda: oc.stable_adamw(0.1),
    "stable_spam": lambda: oc.stable_spam(0.1),
    "spectra": lambda: oc.wrappers.spectra(optax.trace(0.9), 0.1),
}


def program_lines(jaxpr):
    """The lines of a program, with inner ones inlined: JAX prints equal inner ones only once."""
    numbers = {}

    def show(atoms):
        # A literal is not hashable, but its text is its value.
        ids = [x if hasattr(x, "val") else numbers.setdefault(x, len(numbers)) for x in atoms]
        return " ".join(f"{i}:{x.aval}" for i, x in zip(ids, atoms, strict=True))

    yield show([*jaxpr.constvars, *jaxpr.invars])
    for line in jaxpr.eqns:
        yield f"{show(line.outvars)} = {line.primitive} {show(line.invars)}"
        for name, value in sorted(line.params.items()):
            for inner in jax.tree.leaves(value):
                yield f"  {getattr(inner, 'consts', '')}"
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from program_lines(inner)
                elif not callable(inner):
                    yield f"  {name}={inner}"
    yield show(jaxpr.outvars)
