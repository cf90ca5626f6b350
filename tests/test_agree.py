"""Equivalent expressions give equal results, and thresholds receive what the docs promise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import norms, scopes, thresholds
from tests.agree import GRADS, PARAMS, TRANSFORMATIONS

pytestmark = pytest.mark.usefixtures("as_users")  # Optax's transformations promote dtypes


def run(tx, steps=4):
    state, out = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda g, i=i: g * (1.0 + i) ** 2, GRADS)
        updates, state = update(grads, state, PARAMS)
        out.append(updates)
    return out


@pytest.mark.parametrize("what", TRANSFORMATIONS)
def test_two_ways_to_write_one_clip_agree(what):
    one, other = TRANSFORMATIONS[what]
    chex.assert_trees_all_close(run(one()), run(other()), rtol=2e-6)


@pytest.mark.parametrize("norm", [1, 2, 3, jnp.inf], ids=str)
def test_global_norm_is_the_norm_that_a_clip_sees(norm):
    tx = oc.clip_by(jnp.inf, norm=norm)
    seen = oc.metrics(tx.update(GRADS, tx.init(GRADS))[1])["clip/grad_norm"]
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(GRADS)])
    np.testing.assert_allclose(oc.global_norm(GRADS, norm=norm), seen, rtol=1e-7)
    np.testing.assert_allclose(seen, np.linalg.norm(flat, norm), rtol=1e-6)


def test_one_example_is_the_global_clip():
    one = jax.tree.map(lambda g: g[None], GRADS)
    clipped, _ = oc.clip_by_global_norm(1.0).update(GRADS, None)
    chex.assert_trees_all_close(oc.per_example_global_norm_clip(one, 1.0)[0], clipped, rtol=1e-6)


SCOPES = {
    "tree": scopes.tree,
    "leaf": scopes.leaf,
    "groups": scopes.groups(),
    "units": scopes.units(),
}


@pytest.mark.parametrize("name", SCOPES)
def test_a_threshold_gets_the_norms_of_the_parameters_in_the_shape_of_the_norms(name):
    """In the same tree, so transformations of Optax that read `params` work on norms too."""
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return optax.tree.add(updates, params), state

    @jax.jit
    def norms_of_both():
        tx = oc.clip_by(optax.GradientTransformation(lambda norms: (), update), scope=SCOPES[name])
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
        free = oc.clip_by(jnp.inf, scope=SCOPES[name])
        return *seen.pop(), free.update(PARAMS, free.init(PARAMS))[1].metrics.grad_norm

    own, of_params, want = norms_of_both()
    assert not seen
    chex.assert_trees_all_equal_shapes(own, of_params)
    chex.assert_trees_all_close(of_params, want)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.ema(0.9), optax.scale(2.0)),
        lambda: optax.masked(optax.scale(2.0), lambda norms: jax.tree.map(lambda n: True, norms)),
        lambda: optax.add_decayed_weights(0.1),
        lambda: optax.scale_by_schedule(lambda step: 1.0 + step),
    ],
    ids=["ema", "masked", "reads params", "schedule"],
)
def test_transformations_of_optax_are_thresholds(name, make):
    tx = oc.clip_by(thresholds.lag(make()), scope=SCOPES[name])
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))


def test_a_global_state_is_not_mistaken_for_a_per_block_state():
    """A ring of the last two global norms, with two blocks: its shape looks like one per block."""

    def update(updates, state, params=None):
        ring = jnp.concatenate([state[1:], jnp.max(updates)[None]])
        return jax.tree.map(lambda n: jnp.full_like(n, 1e3), updates), ring

    ring = optax.GradientTransformation(lambda norms: jnp.zeros(2), update)
    tx = oc.clip_by(ring, scope=scopes.leaf)
    state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    for a, b in ((1.0, 2.0), (4.0, 5.0)):
        _, state = tx.update({"a": jnp.array([a]), "b": jnp.array([b])}, state)
    np.testing.assert_array_equal(state.threshold, [2.0, 5.0])
    moved = tx.update({"a": jnp.array([6.0]), "b": jnp.array([7.0])}, state)[1].threshold
    np.testing.assert_array_equal(moved, [5.0, 7.0])


def test_a_per_block_state_is_kept_where_the_norm_is_not_finite():
    tx = oc.clip_by(thresholds.lag(optax.ema(0.5)), scope=scopes.leaf, norm=norms.linf)
    state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    for a, b in ((1.0, 1.0), (jnp.nan, 3.0)):
        _, state = tx.update({"a": jnp.array([a]), "b": jnp.array([b])}, state)
    assert state.threshold.clip_bound[0] == 1.0 and state.threshold.clip_bound[1] > 1.5
