"""The bounds that docstrings state hold, and are tight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc
from tests.test_spectral import clipped, decomposed, matrix

LASTING = 60


def follow(tx, norms):
    """The updates of a series of numbers, one per step."""

    def step(state, norm):
        update, state = tx.update(norm[None], state)
        return state, update[0]

    return jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.float32(norms))[1]


# The factor per step by which the bound follows a lasting rise.
RATES = {
    "adagc": (oc.adagc(warmup_steps=1), 0.98 + 0.02 * 1.05),
    "norm_ratio": (oc.clip_by(oc.thresholds.norm_ratio()), 0.95 + 0.05 * 2),
    "running": (oc.clip_by(oc.thresholds.running()), 0.99 + 0.01 * 2),
    "previous": (oc.clip_by(oc.thresholds.previous()), 1.01),
    "limit_norm_growth": (oc.limit_norm_growth(), 1.01),
    "quantile_clip": (oc.quantile_clip(0.999), math.exp(0.2)),
    "adamw_clip": (oc.adamw_clip(), math.sqrt(0.999 + 0.001 * 9)),
}


@pytest.mark.parametrize("name", RATES)
def test_a_lasting_rise_is_followed_no_faster_than_stated(name):
    tx, rate = RATES[name]
    # First steady, until bias corrections have faded, and then near the largest float.
    left = np.asarray(follow(tx, np.r_[np.ones(9000), np.full(LASTING, 1e30)]))[-LASTING:]
    growth = left[1:] / left[:-1]
    assert rate * (1 - 1e-3) < growth.max() < rate * (1 + 1e-5)


def test_a_tenfold_rise_takes_adagc_as_long_as_stated():
    left = follow(RATES["adagc"][0], np.r_[np.ones(200), np.full(2400, 10.0)])
    assert abs(int(jnp.argmax(left > 9.999)) - 200 - 2300) < 50


def test_the_carry_of_u_clip_is_capped_and_nothing_else_is_lost():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=400), 5 + rng.normal(size=400)
    for grads, capped in ((few, False), (many, True)):
        tx, kept = oc.u_clip(1.0, max_carry=8.0), []

        def step(state, grad, tx=tx):
            update, state = tx.update(grad[None], state)
            return state, (update[0], state.carry[0])

        _, (updates, carry) = jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.float32(grads))
        kept = np.cumsum(updates, dtype=float) + carry
        assert np.abs(updates).max() <= 1 + 1e-6
        assert np.abs(carry).max() <= 8 * (1 + 1e-6)
        assert (np.abs(carry).max() > 7.99) == capped
        assert np.allclose(kept, np.cumsum(grads), atol=1e-3) != capped


def test_the_largest_singular_value_is_estimated_as_accurately_as_stated():
    stack = np.random.default_rng(0).normal(size=(200, 12, 9)).astype(np.float32)
    tx = oc.spectral_clip(1.0, stacked="")
    _, state = tx.update(jnp.asarray(stack), tx.init(stack))
    share = state.metrics.grad_norm / np.linalg.norm(stack, 2, axis=(1, 2))
    assert 0.85 < share.min() < 0.95 and share.max() < 1 + 1e-6 and np.median(share) > 0.98


def test_each_step_of_the_polar_iteration_reaches_four_times_as_far():
    near = matrix((6, 5), np.array([2, 1.003, 1, 0.997, 0.5]))
    for steps in (5, 7, 9):
        reach = 14 * 4.0 ** (steps - 5)
        for largest, right in ((0.9 * reach, True), (1.5 * reach, False)):
            x = jnp.asarray(matrix((6, 5), np.array([largest, 2, 1, 0.5, 0.1])), jnp.float32)
            left = clipped(oc.spectral_clip(1.0, steps=steps), x)
            error = np.linalg.norm(left - decomposed(x, 1.0, "hard"), 2)
            assert (error < max(1e-4, 1e-7 * largest)) == right, (steps, largest, error)
    errors = [
        np.linalg.norm(
            clipped(oc.spectral_clip(1.0, steps=steps), jnp.float32(near))
            - decomposed(near, 1.0, "hard"),
            2,
        )
        for steps in (5, 6, 7)
    ]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


@pytest.mark.parametrize("largest", [1e3, 1e9])
def test_float64_is_as_accurate_as_stated(largest):
    with jax.enable_x64(True):
        x = jnp.asarray(matrix((9, 8), np.geomspace(1e-3, largest, 8)))
        error = np.linalg.norm(clipped(oc.spectral_clip(1.0), x) - decomposed(x, 1.0, "hard"), 2)
    assert error < max(1e-10, 2e-16 * largest)
