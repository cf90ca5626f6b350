"""Clips inside Optax's wrappers and JAX's transformations: what each must change, and what it must
not.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[6.0], [8.0]])}
PARAMS = jax.tree.map(jnp.ones_like, GRADS)
UNIT = {"a": jnp.array([0.6, 0.8]), "b": jnp.array([[0.6], [0.8]])}


pytestmark = pytest.mark.usefixtures("mixed_dtypes")  # Optax promotes dtypes


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def lagging(scope=optaxclip.scopes.leaf):
    """An adaptive clip: the bound is the previous norm."""
    return optaxclip.clip_by(optaxclip.thresholds.lag(optax.identity()), scope=scope)


def once(tx, grads=GRADS, params=PARAMS):
    """The updates of the first step, jitted."""
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def test_masked_clips_only_the_masked_leaves():
    """Neither clipped nor counted: the norm is that of "a" alone."""
    for mask in ({"a": True, "b": False}, lambda tree: {"a": True, "b": False}):
        updates = once(optax.masked(optaxclip.clip_by_global_norm(1.0), mask))
        chex.assert_trees_all_close(updates, {"a": UNIT["a"], "b": GRADS["b"]})


def test_masked_states_are_kept_by_path():
    tx = optax.masked(lagging(), {"a": False, "b": True})
    state = tx.init(PARAMS)
    for factor, want in ((1.0, 1.0), (2.0, 1.0), (4.0, 2.0)):
        updates, state = jax.jit(tx.update)(scaled(GRADS, factor), state, PARAMS)
        chex.assert_trees_all_close(updates, {"a": GRADS["a"] * factor, "b": GRADS["b"] * want})


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition_clips_each_part_by_its_own_norm(combine):
    parts = {"loose": optaxclip.clip_by_global_norm(2.0), "tight": optaxclip.clip_by_leaf_norm(1.0)}
    updates = once(combine(parts, {"a": "tight", "b": "loose"}))
    chex.assert_trees_all_close(updates, {"a": UNIT["a"], "b": 2 * UNIT["b"]})


def test_partition_by_a_function_of_the_tree():
    parts = {"clip": optax.chain(lagging(), optax.sgd(1.0)), "freeze": optax.set_to_zero()}
    tx = optax.partition(parts, lambda tree: {"a": "clip", "b": "freeze"})
    state = tx.init(PARAMS)
    for factor, want in ((1.0, 1.0), (3.0, 1.0)):
        updates, state = jax.jit(tx.update)(scaled(GRADS, factor), state, PARAMS)
        chex.assert_trees_all_close(updates, {"a": -want * GRADS["a"], "b": jnp.zeros((2, 1))})


@pytest.mark.parametrize("skip", [None, optax.skip_not_finite])
def test_multi_steps_clips_the_mean_of_the_micro_batches(skip):
    """The clip sees the mean, once every three steps, and its history counts these only."""
    tx = optax.MultiSteps(optax.chain(lagging(), optax.sgd(1.0)), 3, should_skip_update_fn=skip)
    state, seen = tx.init(PARAMS), []
    for factor in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        updates, state = jax.jit(tx.update)(scaled(GRADS, factor), state, PARAMS)
        seen.append(float(updates["a"][0] / -GRADS["a"][0]))
    np.testing.assert_allclose(seen, [0, 0, 2, 0, 0, 2], rtol=1e-6)
    assert optaxclip.metrics(state)["clip/steps"] == 2


def test_multi_steps_outside_accumulates_what_each_micro_batch_leaves():
    tx = optax.chain(
        optaxclip.clip_by_leaf_norm(1.0),
        optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
    )
    state = tx.init(PARAMS)
    for factor in (1.0, 0.1):
        updates, state = jax.jit(tx.update)(scaled(GRADS, factor), state, PARAMS)
    chex.assert_trees_all_close(updates, {"a": -0.75 * UNIT["a"], "b": -1.0 * UNIT["b"]}, rtol=1e-6)


INJECTED = {
    "global": (
        optaxclip.clip_by_global_norm,
        "max_norm",
        lambda bound: scaled(GRADS, bound / 125**0.5),
    ),
    "leaf": (optaxclip.clip_by_leaf_norm, "max_norm", lambda bound: scaled(UNIT, bound)),
    "group": (
        optaxclip.clip_by_group_norm,
        "max_norm",
        lambda bound: scaled(GRADS, bound / 125**0.5),
    ),
    "clip_by": (optaxclip.clip_by, "threshold", lambda bound: scaled(GRADS, bound / 125**0.5)),
    "rms": (optaxclip.clip_by_block_rms, "threshold", lambda bound: scaled(UNIT, bound * 2**0.5)),
    "adaptive": (
        optaxclip.adaptive_grad_clip,
        "clipping",
        lambda bound: scaled(UNIT, bound * 2**0.5),
    ),
    "value": (
        optaxclip.clip,
        "max_delta",
        lambda bound: jax.tree.map(lambda x: jnp.full_like(x, bound), GRADS),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams_with_a_schedule(name, dtype):
    """In bfloat16 too, where the hyperparameter is cast to the dtype of the parameters and Optax's
    clips raise.
    """
    make, argument, want = INJECTED[name]
    tx = optax.inject_hyperparams(make)(**{argument: lambda step: 1.0 / 2**step})
    grads, params = optax.tree.cast((GRADS, PARAMS), dtype)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for bound in (1.0, 0.5, 0.25):
        updates, state = step(grads, state, params)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        close = {"rtol": 4 * float(jnp.finfo(dtype).eps)}
        chex.assert_trees_all_close(updates, optax.tree.cast(want(bound), dtype), **close)


def test_injected_hyperparameters_can_be_set_in_the_state():
    tx = optax.inject_hyperparams(optaxclip.clip_by_leaf_norm)(max_norm=1.0)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for bound in (1.0, 3.0, 0.0):
        state.hyperparams["max_norm"] = jnp.asarray(bound)
        updates, state = step(GRADS, state, PARAMS)
        chex.assert_trees_all_close(updates, scaled(UNIT, bound), rtol=1e-6)
    assert step._cache_size() == 1


def test_injected_hyperparameters_are_validated_where_they_are_concrete():
    """Out of jit a bound is a number, and refused if it is negative; in jit it is a tracer, and
    counts as 0.
    """
    tx = optax.inject_hyperparams(optaxclip.clip_by_leaf_norm)(max_norm=lambda step: 1.0 - 2 * step)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, UNIT, rtol=1e-6)
    with pytest.raises(ValueError, match="max_norm must be a number from 0 to inf"):
        tx.update(GRADS, state, PARAMS)
    chex.assert_trees_all_equal(
        jax.jit(tx.update)(GRADS, state, PARAMS)[0], jax.tree.map(jnp.zeros_like, GRADS)
    )


def test_a_whole_optimizer_with_clip_and_rate_injected():
    @optax.inject_hyperparams
    def optimizer(max_norm, learning_rate):
        return optax.chain(optaxclip.clip_by_leaf_norm(max_norm), optax.sgd(learning_rate))

    tx = optimizer(max_norm=optax.linear_schedule(1.0, 0.0, 2), learning_rate=0.5)
    state = tx.init(PARAMS)
    for bound in (1.0, 0.5, 0.0):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        chex.assert_trees_all_close(updates, scaled(UNIT, -0.5 * bound), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_apply_if_finite_holds_the_history_too(bad):
    tx = optax.apply_if_finite(optax.chain(lagging(), optax.sgd(1.0)), max_consecutive_errors=5)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    updates, state = step(GRADS, state, PARAMS)
    updates, state = step(GRADS | {"a": jnp.array([bad, 1.0])}, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, GRADS))
    updates, state = step(scaled(GRADS, 9.0), state, PARAMS)
    chex.assert_trees_all_close(updates, scaled(GRADS, -1.0), rtol=1e-6)
    seen = optaxclip.metrics(state)
    assert seen["clip/steps"] == 2 and seen["clip/nonfinite_steps"] == 0


def test_lookahead_takes_the_clip_inside():
    tx = optax.lookahead(optax.chain(lagging(), optax.sgd(1.0)), sync_period=4, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for factor in (1.0, 7.0):
        updates, state = jax.jit(tx.update)(scaled(GRADS, factor), state, params)
        chex.assert_trees_all_close(updates.fast, scaled(GRADS, -1.0), rtol=1e-6)


def test_named_chain_and_flatten():
    tx = optax.named_chain(("clip", optaxclip.clip_by_leaf_norm(1.0)), ("step", optax.sgd(2.0)))
    chex.assert_trees_all_close(once(tx), scaled(UNIT, -2.0))
    assert isinstance(tx.init(PARAMS)["clip"], optaxclip.base.ClipState)
    tx = optax.flatten(
        optaxclip.clip_by_leaf_norm(1.0)
    )  # one flat vector: a leaf norm becomes the global norm
    chex.assert_trees_all_close(once(tx), scaled(GRADS, 1 / 125**0.5), rtol=1e-6)


SCOPES = {
    "tree": optaxclip.scopes.tree,
    "leaf": optaxclip.scopes.leaf,
    "groups": optaxclip.scopes.groups(lambda path: "all"),
    "units": optaxclip.scopes.units(),
}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_scan_cond_and_donation_agree_with_plain_steps(scope):
    tx = optax.chain(lagging(scope), optax.adam(0.1))
    factors = jnp.array([1.0, 5.0, 0.1, 3.0])

    def step(carry, factor):
        params, state = carry
        updates, new = tx.update(scaled(GRADS, factor), state, params)
        moved = optax.apply_updates(params, updates), new
        return jax.lax.cond(factor < 4, lambda: moved, lambda: carry), optaxclip.metrics(new)[
            "clip/steps"
        ]

    plain, steps = (PARAMS, tx.init(PARAMS)), []
    for factor in factors:
        plain, count = jax.jit(step)(plain, factor)
        steps.append(int(count))
    start = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    scanned, counts = jax.jit(lambda carry: jax.lax.scan(step, carry, factors), donate_argnums=0)(
        start
    )
    chex.assert_trees_all_close(scanned, plain, rtol=1e-6)
    assert counts.tolist() == steps == [1, 2, 2, 3]  # the second step was not taken
    assert all(x.is_deleted() for x in jax.tree.leaves(start))


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_map_params_passes_over_our_state(scope):
    """It is used to derive the shardings of an optimizer state from those of the parameters."""
    adaptive = (
        lagging(scope) if scope is not SCOPES["units"] else optaxclip.clip_by(1.0, scope=scope)
    )
    tx = optax.chain(adaptive, optaxclip.u_clip(1.0, scope=scope), optax.adam(0.1))
    state = tx.init(PARAMS)
    names = {"a": "sharded a", "b": "sharded b"}
    mapped = optax.tree.map_params(
        tx, lambda x, name: name, state, names, transform_non_params=lambda x: "whole"
    )
    assert mapped[2][0].mu == mapped[2][0].nu == mapped[1].carry == names
    assert mapped[2][0].count == "whole"
    assert set(jax.tree.leaves(mapped[0].metrics)) == {"whole"}
    whole = optax.tree.map_params(tx, lambda x, name: x, state, names)
    chex.assert_trees_all_equal(whole, state)


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_vmap_over_the_bound_is_one_training_run_for_each(scope):
    def train(max_norm, rate):
        tx = optax.chain(optaxclip.clip_by(max_norm, scope=scope), optax.sgd(rate, momentum=0.5))
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(scaled(GRADS, 1.0), state, params)
            params = optax.apply_updates(params, updates)
        return params, optaxclip.metrics(state)["clip/bound"]

    bounds, rates = jnp.array([0.0, 0.5, 7.0, jnp.inf]), jnp.array([0.1, 0.2, 0.3, 0.4])
    together, seen = jax.jit(jax.vmap(train))(bounds, rates)
    np.testing.assert_array_equal(seen, bounds)
    for i in range(len(bounds)):
        alone, _ = jax.jit(train)(bounds[i], rates[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-6)


def test_vmap_over_states_keeps_each_its_own_history():
    tx = lagging(optaxclip.scopes.tree)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    step = jax.jit(jax.vmap(lambda factor, state: tx.update(scaled(GRADS, factor), state)))
    _, state = step(jnp.array([1.0, 2.0, 3.0]), state)
    updates, state = step(jnp.array([10.0, 1.0, 6.0]), state)
    np.testing.assert_allclose(updates["a"][:, 0] / 3.0, [1.0, 1.0, 3.0], rtol=1e-6)
    np.testing.assert_array_equal(optaxclip.metrics(state)["clip/clipped"], [1, 0, 1])
