"""The table of expressions that must be equal: each row is two ways to write the same thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import optaxclip as oc
from optaxclip import actions, norms, scopes, thresholds

GRADS = {
    "embed": {"table": jnp.arange(12.0).reshape(4, 3) / 7},
    "layers": [{"kernel": jnp.ones((3, 2)) * (i + 1), "bias": -jnp.ones(2) * i} for i in range(3)],
}
PARAMS = jax.tree.map(lambda g: jnp.cos(g) + 0.5, GRADS)

MEAN_SQUARE = thresholds.Statistic(
    0.0,
    lambda g, rms, seen: jnp.hypot(0.9**0.5 * rms, 0.1**0.5 * g),
    # No bound if all gradients were zero, as in `spam_clip`.
    lambda g, rms, seen: jnp.where(rms == 0, jnp.inf, 2 * rms),
    signed=True,
)
ONE_EACH = jax.tree.map(lambda g: 0.5, GRADS)


def rows(path):
    """How many leading axes of a leaf number its rows."""
    return 0 if path.endswith("bias") else 1


# Name: (one way, the other). A transformation is run for a few steps, a function is called.
TRANSFORMATIONS = {
    "clip_by is the global clip": (lambda: oc.clip_by(1.0), lambda: oc.clip_by_global_norm(1.0)),
    "a number is a constant": (
        lambda: oc.clip_by(1.0),
        lambda: oc.clip_by(thresholds.constant(1.0)),
    ),
    "a function is a schedule": (
        lambda: oc.clip_by(lambda step: 1.0 / (step + 1)),
        lambda: oc.clip_by(thresholds.scheduled(lambda step: 1.0 / (step + 1))),
    ),
    "leaf is groups by path": (
        lambda: oc.clip_by_leaf_norm(0.5),
        lambda: oc.clip_by_group_norm(0.5, lambda path: path),
    ),
    "tree is one group": (
        lambda: oc.clip_by_global_norm(0.5),
        lambda: oc.clip_by_group_norm(0.5, lambda path: "all"),
    ),
    "leaf is units of whole leaves": (
        lambda: oc.clip_by_leaf_norm(0.5),
        lambda: oc.clip_by(0.5, scope=scopes.units(...)),
    ),
    "a value clip is a clip of units of one element": (
        lambda: oc.clip(0.5),
        lambda: oc.clip_by(0.5, scope=scopes.units(())),
    ),
    "a value clip is a clip between two limits": (
        lambda: oc.clip(0.5),
        lambda: oc.clip_by_value(-0.5, 0.5),
    ),
    "element is units of one element": (
        lambda: oc.zclip(scope=scopes.element, warmup_steps=2),
        lambda: oc.zclip(scope=scopes.units(()), warmup_steps=2),
    ),
    "a value clip is a clip by element": (
        lambda: optax.clip(0.5),
        lambda: oc.clip_by(0.5, scope=scopes.element),
    ),
    "a clip of spikes is one by element of its mean square": (
        lambda: oc.spam_clip(4.0, 0.9, warmup_steps=1, every=None),
        lambda: oc.clip_by(
            thresholds.learned(MEAN_SQUARE, feed=oc.feeds.clipped), scope=scopes.element
        ),
    ),
    "rows that are stacked are units of a row": (
        lambda: oc.clip_by(0.5, scope=scopes.stacked("kernel|table")),
        lambda: oc.clip_by(0.5, scope=scopes.units(..., batch_axes=rows)),
    ),
    "bounds by layer are bounds by leaf": (
        lambda: oc.clip_by_leaf_norm(ONE_EACH | {"embed": {"table": [0.5] * 4}}, stacked="^embed"),
        lambda: oc.clip_by_leaf_norm(0.5, stacked="table"),
    ),
    "thresholds by name are thresholds": (
        lambda: oc.clip_by_group_norm(
            {"embed": thresholds.previous(1.1), "layers": 0.5}, {"^e": "embed", "^l": "layers"}
        ),
        lambda: optax.chain(
            oc.clip_by(thresholds.previous(1.1), exclude="^l"), oc.clip_by(0.5, exclude="^e")
        ),
    ),
    "block rms is leaf and rms": (
        lambda: oc.clip_by_block_rms(0.5),
        lambda: oc.clip_by(0.5, scope=scopes.leaf, norm=norms.rms),
    ),
    "p = 2 is l2": (lambda: oc.clip_by(1.0, norm=2), lambda: oc.clip_by(1.0, norm=norms.l2)),
    "p = inf is linf": (
        lambda: oc.clip_by(1.0, norm=jnp.inf),
        lambda: oc.clip_by(1.0, norm=norms.linf),
    ),
    "smooth with p = inf is rescale": (
        lambda: oc.smooth_clip(1.0, jnp.inf),
        lambda: oc.clip_by(1.0, action=actions.rescale),
    ),
    "band without a floor is rescale": (
        lambda: oc.clip_by(1.0, action=actions.band(0.0)),
        lambda: oc.clip_by(1.0),
    ),
    "zclip is zscore": (
        lambda: oc.zclip(warmup_steps=2),
        lambda: oc.clip_by(thresholds.zscore(2.5, 0.97, warmup_steps=2)),
    ),
    "autoclip is percentile": (
        lambda: oc.autoclip(50.0, window=5),
        lambda: oc.clip_by(thresholds.percentile(50.0, window=5)),
    ),
    "quantile_clip is quantile": (
        lambda: oc.quantile_clip(0.5),
        lambda: oc.clip_by(thresholds.quantile(0.5, init=0.1)),
    ),
    "clip_by_median is median": (
        lambda: oc.clip_by_median(2.0, window=3, every=2),
        lambda: oc.clip_by(thresholds.median(2.0, window=3, every=2)),
    ),
    "limit_norm_growth is previous": (
        lambda: oc.limit_norm_growth(1.1),
        lambda: oc.clip_by(thresholds.previous(1.1), scope=scopes.leaf),
    ),
    "AGC is a share of the parameters' norm by unit": (
        lambda: oc.adaptive_grad_clip(0.1),
        lambda: oc.clip_by(thresholds.param_relative(0.1), scope=scopes.units()),
    ),
    "a running mean of optax's is ours": (
        lambda: oc.clip_by(thresholds.lag(optax.chain(optax.ema(0.9), optax.scale(2.0)))),
        lambda: oc.clip_by(thresholds.running(2.0, 0.9, feed=oc.feeds.raw)),
    ),
    "the smaller of two bounds": (
        lambda: oc.clip_by(thresholds.at_most(5.0, 1.0)),
        lambda: oc.clip_by(thresholds.at_least(0.5, 1.0)),
    ),
    "skipping what is infinite only is skipping nothing": (
        lambda: oc.skip_spikes(optax.sgd(0.1), jnp.inf),
        lambda: oc.skip_nonfinite(optax.sgd(0.1)),
    ),
    "optax's global clip, where its norm is right": (
        lambda: oc.clip_by_global_norm(1.0),
        lambda: optax.clip_by_global_norm(1.0),
    ),
}
