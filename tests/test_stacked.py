"""A model that stacks its layers is clipped as the same model with its layers in a list."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from optaxclip import scopes

LAYERS = 3
RNG = np.random.default_rng(0)
LIST = {
    "blocks": [
        {
            "bias": jnp.asarray(RNG.normal(size=2), jnp.float32) * (i + 1),
            "kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.bfloat16),
        }
        for i in range(LAYERS)
    ],
    "head": {"kernel": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)},
}
STACKED = scopes.stacked("^blocks")


def stack(tree, axis=0):
    """The layers of a tree as one, with an axis that numbers them."""
    layers = jax.tree.map(lambda *xs: jnp.stack(xs, axis), *tree["blocks"])
    return tree | {"blocks": layers}


def renamed(metrics):
    """The metrics of the stacked tree by the names of those of the list."""
    return {re.sub(r"blocks(.*)\[(\d)\]", r"blocks/\2\1", k): x for k, x in metrics.items()}


FACTORS = (1.0, 3.0, jnp.inf, 20.0)


def run(tx, grads):
    """The updates and the metrics of each of a few steps."""

    def step(state, factor):
        now = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, state = tx.update(now, state, grads)
        return state, (updates, oc.metrics(state))

    return jax.lax.scan(step, tx.init(grads), jnp.array(FACTORS))[1]


CLIPS = {
    "smooth linf": lambda **k: oc.clip_by(1.0, norm=jnp.inf, action=oc.actions.smooth(2.0), **k),
    "zero l1": lambda **k: oc.clip_by(4.0, norm=1, nonfinite="zero", action=oc.actions.zero, **k),
    "rms": lambda **k: oc.clip_by(0.7, norm=oc.norms.rms, **k),
    "param_relative": lambda **k: oc.clip_by(oc.thresholds.param_relative(1.5), **k),
    "zclip": oc.zclip,
    "clip_by_momentum_norm": oc.clip_by_momentum_norm,
}
GROUPS = scopes.groups(lambda path: "head" if path.startswith("head") else path.rpartition("/")[0])
BY_SCOPE = {"leaf": (scopes.leaf, CLIPS), "groups": (GROUPS, {"zclip": oc.zclip})}


@pytest.mark.parametrize("name", BY_SCOPE)
def test_each_layer_is_clipped_as_the_layer_of_a_list(name):
    """All in one program: rules learn by layer, a layer of parameters is the measure of its own."""
    scope, clips = BY_SCOPE[name]

    def everything(grads, scope):
        return {name: run(make(scope=scope), grads) for name, make in clips.items()}

    want = jax.jit(lambda: everything(LIST, scope))()
    got = jax.jit(lambda: everything(stack(LIST), scopes.stacked("^blocks", scope)))()
    for name, (updates, seen) in want.items():
        steps = [jax.tree.map(lambda x, i=i: x[i], updates) for i in range(len(FACTORS))]
        want_updates = jax.tree.map(lambda *xs: jnp.stack(xs), *map(stack, steps))
        chex.assert_trees_all_close(got[name][0], want_updates, rtol=1e-5, custom_message=name)
        chex.assert_trees_all_close(renamed(got[name][1]), seen, rtol=1e-5, custom_message=name)
