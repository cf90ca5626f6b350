"""Wrappers of the optimizer: a skipped step changes nothing, and no run is locked out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from tests.cases import lingvo

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADS = {"w": jnp.array([0.3, 0.4]), "b": jnp.array([0.0])}  # norm 0.5


pytestmark = pytest.mark.usefixtures("mixed_dtypes")  # Optax promotes dtypes


def times(factor):
    return jax.tree.map(lambda g: g * factor, GRADS)


def run(tx, factors, losses=None):
    """A jitted scan over multiples of the gradients: the state, and the updates of each step."""

    def step(state, now):
        factor, loss = now
        passed = {} if losses is None else {"loss": loss}
        updates, state = tx.update(times(factor), state, PARAMS, **passed)
        return state, (updates, state.skipped_steps)

    factors = jnp.asarray(factors, jnp.float32)
    losses = factors if losses is None else jnp.asarray(losses, jnp.float32)
    return jax.jit(lambda s: jax.lax.scan(step, s, (factors, losses)))(tx.init(PARAMS))


@pytest.mark.parametrize(
    "inner", [optax.adamw, optax.contrib.muon, lambda r: optax.sgd(r, momentum=0.9), optax.lion]
)
def test_a_run_with_bad_steps_equals_the_run_without_them(inner):
    """A skipped step moves no moment, counter or statistic, so leaving it out changes nothing."""
    tx = oc.skip_spikes(optax.chain(oc.zclip(warmup_steps=1), inner(0.1)), 10.0)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    good = [jax.tree.map(lambda p, i=i: p * (1.0 + i), params) for i in range(3)]
    bad = [jax.tree.map(lambda p, f=f: p * f, params) for f in (1e6, jnp.nan, jnp.inf)]
    step = jax.jit(tx.update)

    def after(run):
        state = tx.init(params)
        for grads in run:
            updates, state = step(grads, state, params)
        return updates, state.inner

    chex.assert_trees_all_equal(after([good[0], *bad, good[1], bad[1], good[2]]), after(good))
    updates, state = step(bad[0], tx.init(params), params)
    assert all(not u.any() for u in jax.tree.leaves(updates)) and state.skipped_steps == 1


RULES = {
    "constant": (lambda: oc.skip_spikes(optax.identity(), 5.0), 1),
    "20 x mean": (
        lambda: oc.skip_spikes(
            optax.identity(), oc.thresholds.running(20.0, feed=oc.feeds.accepted)
        ),
        2,
    ),
    "6 sigma": (lambda: oc.skip_spikes(optax.identity()), 70),
    "log z": (lambda: oc.skip_spikes(optax.identity(), lingvo()), 70),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_documented_rules_skip_a_spike_and_nothing_else(rule):
    make, warm = RULES[rule]
    noise = np.exp(0.2 * np.random.default_rng(0).normal(size=200))
    noise[[warm, 150]] = 1e3, np.nan
    state, (updates, skipped) = run(make(), noise)
    assert np.flatnonzero(np.diff(skipped, prepend=0)).tolist() == [warm, 150]
    assert not updates["w"][warm].any() and not updates["w"][150].any()
    assert state.last_reason == 3 and state.spike.metrics.nonfinite_steps == 1


def test_a_loss_that_is_passed_is_tested():
    losses = np.random.default_rng(0).normal(size=200) * 0.1 - 3.0  # losses may be negative
    losses[[100, 120, 130]] = 50.0, np.nan, -np.inf
    state, (_, skipped) = run(oc.skip_spikes(optax.identity()), np.full(200, 1.0), losses)
    assert np.flatnonzero(np.diff(skipped, prepend=0)).tolist() == [100, 120, 130]
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state.loss))
    _, (_, skipped) = run(oc.skip_nonfinite(optax.identity()), np.full(200, 1.0), losses)
    assert np.flatnonzero(np.diff(skipped, prepend=0)).tolist() == [120, 130]


def test_a_threshold_of_losses_needs_a_loss():
    tx = oc.skip_spikes(optax.identity(), 1.0, loss_threshold=5.0)
    with pytest.raises(ValueError, match="loss=loss"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, loss=6.0)
    assert state.skipped_steps == 1 and not updates["w"].any()


def test_the_loss_is_passed_on():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda updates, state, params=None, **extra: (
            optax.tree.scale(extra["loss"], updates),
            state,
        ),
    )
    tx = oc.skip_spikes(inner)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, loss=2.0)
    chex.assert_trees_all_close(updates, times(2.0))


def test_no_run_is_locked_out():
    """After the maximum of consecutive skips a step is taken and the statistics are reset."""
    rise = np.r_[np.ones(80), np.full(60, 1000.0)]
    tx = oc.skip_spikes(
        optax.identity(),
        oc.thresholds.running(5.0, feed=oc.feeds.accepted),
        max_consecutive_skips=20,
    )
    state, (updates, skipped) = run(tx, rise)
    assert skipped[99] == 20 and skipped[-1] == 20 and updates["w"][100].any()
    assert oc.metrics(state)["skip/bound"] > 1000
    never = oc.skip_spikes(optax.identity(), 5.0, max_consecutive_skips=3)
    state, (updates, skipped) = run(never, np.full(50, np.nan))
    assert skipped[-1] == 50 and state.consecutive_skips == 50 and not updates["w"].any()


def test_multi_steps_tests_the_mean():
    tx = optax.MultiSteps(oc.skip_spikes(optax.sgd(1.0, momentum=0.9), 3.0), every_k_schedule=2)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    seen = []
    for factor in (1.0, 1.0, 1.0, 100.0, 1.0, 1.0):
        updates, state = step(times(factor), state, PARAMS)
        seen.append(float(updates["w"][0]))
    np.testing.assert_allclose(seen, [0, -0.3, 0, 0, 0, -0.3 * 1.9], atol=1e-6)
    assert state.inner_opt_state.skipped_steps == 1


def test_devices_agree_on_the_decision():
    """The norm of the whole is over the bound, that of no part is: under jit and in shard_map all
    skip.
    """
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    tx = oc.skip_spikes(optax.trace(0.9), 3.0)
    grads = jax.device_put(jnp.full(4, 2.0), NamedSharding(mesh, P("x")))
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    assert not updates.any() and state.skipped_steps == 1

    def step(grads):
        updates, state = tx.update(grads, tx.init(grads), grads)
        return updates, state.skipped_steps

    updates, skipped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P()))
    )(grads)
    assert not updates.any() and skipped == 1


def test_metrics_find_the_record():
    tx = optax.chain(oc.skip_spikes(optax.sgd(0.1), 10.0))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    seen = oc.metrics(state)
    np.testing.assert_allclose([seen["skip/grad_norm"], seen["skip/bound"]], [0.5, 10.0])
    assert optax.tree.get(state, "skipped_steps") == 0


def test_vmap_skips_each_run_by_itself():
    tx = oc.skip_spikes(optax.trace(0.9), 1.0)
    grads = {"w": jnp.array([[0.3, 0.4], [3.0, 4.0]]), "b": jnp.zeros((2, 1))}
    state = jax.vmap(tx.init)(grads)
    updates, state = jax.vmap(tx.update)(grads, state)
    assert (
        updates["w"][0].any()
        and not updates["w"][1].any()
        and state.skipped_steps.tolist() == [0, 1]
    )


def test_moments_are_reset_with_the_counter_of_their_bias():
    tx = oc.reset_moments(optax.scale_by_adam(), every=3, warmup_steps=0)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    seen = []
    for factor in (1.0, 1.0, 100.0, 1.0, 1.0):
        updates, state = step(times(factor), state, PARAMS)
        seen.append(updates["w"])
    np.testing.assert_allclose(seen[3], seen[0], rtol=1e-6)  # a fresh start
    assert state.reset_step == 2
    warm = oc.reset_moments(optax.identity(), every=10, warmup_steps=4)
    state, factors = warm.init(PARAMS), []
    for _ in range(12):
        updates, state = warm.update(GRADS, state, PARAMS)
        factors.append(float(updates["w"][0] / GRADS["w"][0]))
    want = [1 - 0.99 * 0.5 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    np.testing.assert_allclose(factors, [*want, *[1.0] * 6, *want[:2]], rtol=1e-5)
