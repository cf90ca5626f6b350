"""The dynamic loss scale: its rule, and a float16 training that needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.wrappers import dynamic_loss_scale


def reference(finite, scale=8.0, factor=4.0, interval=3, low=0.5, high=64.0):
    """The scale after each step."""
    out, row = [], 0
    for fine in finite:
        row = row + 1 if fine else 0
        if not fine:
            scale = max(scale / factor, low)
        elif row == interval:
            scale, row = min(scale * factor, high), 0
        out.append(scale)
    return out


def test_the_scale_grows_backs_off_and_stays_between_its_limits():
    finite = np.random.default_rng(0).random(300) > 0.2
    options = {"factor": 4.0, "growth_interval": 3, "min_scale": 0.5, "max_scale": 64.0}
    tx = dynamic_loss_scale(optax.scale(1.0), 8.0, **options)

    def step(state, fine):
        # What a backward pass returns: 3, times the scale.
        grads = jnp.where(fine, 3 * state.loss_scale, jnp.nan)[None]
        updates, state = tx.update(grads, state)
        return state, (updates[0], state.loss_scale)

    state, (updates, scales) = jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.asarray(finite))
    np.testing.assert_array_equal(scales, reference(finite))
    assert {0.5, 64.0} < set(scales.tolist())
    np.testing.assert_array_equal(updates, np.where(finite, 3.0, 0.0))
    assert state.inner.skipped_steps == np.sum(~finite)
    seen = oc.metrics(state)
    assert seen["loss_scale"] == scales[-1] and seen["skip/steps"] == np.sum(~finite)


def test_the_clip_inside_sees_the_gradient_without_its_scale():
    tx = dynamic_loss_scale(optax.chain(oc.clip_by_global_norm(1.0), optax.scale(1.0)), 1024.0)
    grads = {"w": jnp.array([3.0, 4.0]) * 1024}
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)
    assert oc.metrics(state)["clip/grad_norm"] == 5
    assert str(oc.explain(state)).endswith("loss scale 1024")


def test_check_finds_a_clip_before_it():
    before = optax.chain(oc.clip_by_global_norm(1.0), dynamic_loss_scale(optax.sgd(0.1)))
    assert "clip-before-unscale" in str(oc.check(before, jnp.ones(2)))
    inside = dynamic_loss_scale(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1)))
    assert not oc.check(inside, jnp.ones(2))


def train(scaled):
    """80 steps of a float16 model whose gradients are below the smallest float16."""
    optimizer = optax.chain(oc.clip_by_global_norm(1e-6), optax.adam(0.1))
    tx = dynamic_loss_scale(optimizer, 2.0**24) if scaled else optimizer

    def loss(w, scale):
        short = w.astype(jnp.float16)
        # Gradients of about 1e-8: float16 has nothing between 0 and 6e-8.
        return jnp.mean((short - 1) ** 2 * jnp.float16(scale * 2.0**-12)) * jnp.float16(2.0**-14)

    @jax.jit
    def step(w, state):
        scale = state.loss_scale if scaled else jnp.float32(1.0)
        updates, state = tx.update(jax.grad(loss)(w, scale), state, w)
        return optax.apply_updates(w, updates), state

    with jax.numpy_dtype_promotion("standard"):
        w, state = jnp.zeros(8), tx.init(jnp.zeros(8))
        for _ in range(80):
            w, state = step(w, state)
    return w


def test_it_trains_where_plain_float16_fails():
    assert np.all(train(scaled=False) == 0)
    np.testing.assert_allclose(train(scaled=True), 1, atol=0.05)


@pytest.mark.parametrize(
    "wrong",
    [{"initial_scale": 0}, {"factor": 1.0}, {"growth_interval": 0}, {"min_scale": -1.0}],
    ids=str,
)
def test_numbers_out_of_range_are_rejected(wrong):
    with pytest.raises(ValueError, match=f"dynamic_loss_scale: {next(iter(wrong))}"):
        dynamic_loss_scale(optax.sgd(0.1), **wrong)
