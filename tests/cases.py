"""The table: every clip and part, one line each. An entry here is enrolled in every law of `test_contract.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import optaxclip as oc


class Case(NamedTuple):
    """One clip.

    Attributes:
      name: what the test reports call it.
      make: the clip with a given bound; further keyword arguments go to the clip.
      block: "tree", "leaf", "unit" or "element": what shares one norm.
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


def by(threshold=lambda bound: bound, **parts):
    """`clip_by` with these parts."""
    return lambda bound, **more: oc.clip_by(threshold(bound), **parts, **more)


def no_bound(norm, state):
    return jnp.full_like(norm, jnp.inf), norm


def longest(norm, state):
    state = jnp.maximum(norm, state)
    return state, state


CASES = [
    Case("clip_by_global_norm", oc.clip_by_global_norm),
    Case("clip_by_global_norm p=1", lambda b, **k: oc.clip_by_global_norm(b, norm=1, **k), norm=1),
    Case("clip_by_global_norm p=3", lambda b, **k: oc.clip_by_global_norm(b, norm=3, **k), norm=3),
    Case("clip_by_global_norm p=inf", lambda b, **k: oc.clip_by_global_norm(b, norm=jnp.inf, **k), norm=jnp.inf),
    Case("clip_by_leaf_norm", oc.clip_by_leaf_norm, "leaf"),
    Case("clip_by_group_norm", lambda b, **k: oc.clip_by_group_norm(b, lambda path: path, **k), "leaf"),
    Case("clip_by_block_rms", oc.clip_by_block_rms, "leaf", norm="rms"),
    Case("clip", lambda b, nonfinite=None, **k: oc.clip(b, **k), "element"),
    Case("clip_by whole leaves as units", by(scope=oc.units(...)), "leaf"),
    Case("clip_by units", by(scope=oc.units()), "unit"),
    Case("clip_by normalize", by(action=oc.normalize), hard=False),
    Case("clip_by smooth", by(action=oc.smooth(2.0), scope=oc.leaf), "leaf", hard=False),
    Case("clip_by smooth p=inf", by(action=oc.smooth(jnp.inf), scope=oc.leaf), "leaf"),
    Case("clip_by band", by(action=oc.band(0.5)), hard=False),
    Case("clip_by zero", by(action=oc.zero, scope=oc.leaf), "leaf", hard=False),
    Case("constant", by(oc.constant)),
    Case("scheduled", by(lambda b: oc.scheduled(lambda step: b)), history=True),
    Case("until", by(lambda b: oc.until(3, b, b), scope=oc.leaf), "leaf", history=True),
    Case("at_least", by(lambda b: oc.at_least(b, 0.0))),
    Case("at_most", by(lambda b: oc.at_most(jnp.inf, b), scope=oc.units()), "unit"),
    Case("at_most lag", by(lambda b: oc.at_most(oc.lag(optax.scale(jnp.inf)), b)), history=True),
    Case("per_block", by(lambda b: oc.at_most(oc.per_block(0.0, no_bound), b), scope=oc.leaf), "leaf", history=True),
    Case("adaptive_grad_clip", oc.adaptive_grad_clip, "unit", relative=True),
    Case("adaptive_grad_clip leaves", lambda b, **k: oc.adaptive_grad_clip(b, axis=..., **k), "leaf", relative=True),
    Case("param_relative", by(lambda b: oc.param_relative(b, 1e-3), scope=oc.leaf), "leaf", relative=True),
]
HARD = [case for case in CASES if case.hard]
# Statistics that a gradient moves, at several scopes.
ADAPTIVE = {
    "lag ema tree": lambda: oc.clip_by(oc.lag(optax.chain(optax.ema(0.9), optax.scale(2.0)))),
    "lag ema leaf": lambda: oc.clip_by(oc.lag(optax.chain(optax.ema(0.9), optax.scale(2.0))), scope=oc.leaf),
    "lag per_block": lambda: oc.clip_by(oc.lag(oc.per_block(0.0, longest), feed=oc.accepted), scope=oc.leaf),
    "per_block units": lambda: oc.clip_by(oc.per_block(0.0, longest), scope=oc.units()),
    "raw optax": lambda: oc.clip_by(optax.chain(optax.ema(0.9), optax.scale(2.0)), scope=oc.groups()),
}
