"""Derivatives through many updates and their state are finite, and correct where smooth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import CASES, ROWS

# Fixed bounds are in test_contract.py.
LEARNING = sorted(ROWS.keys() - {case.name for case in CASES if not case.history})
STEPS, SHAPE, H = 160, (3, 2), 1e-5


# Optax's transformations promote dtypes.
pytestmark = [pytest.mark.usefixtures("as_users"), pytest.mark.slow]


@pytest.mark.parametrize("name", LEARNING)
def test_derivatives_through_many_updates_are_finite_and_correct(name):
    rng = np.random.default_rng(0)
    grads, along, weights = rng.normal(size=(3, STEPS, *SHAPE))
    # Zeros before and after the warm-up, but not for Optax's Adam: its derivatives there are NaN.
    for t in (2, 140) if not name.startswith("stable_") else ():
        grads[t] = along[t] = 0
    # A spike early, and one late.
    for t in (1, 150):
        grads[t] *= 20

    with jax.enable_x64(True):
        tx, params = ROWS[name](), jnp.asarray(rng.normal(size=SHAPE))

        def step(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        def total(grads):
            return jnp.vdot(jax.lax.scan(step, tx.init(params), grads)[1], weights)

        # Differences need the values at two more points, which the same program computes.
        points = grads + H * np.array([-1, 0, 1]).reshape(-1, 1, 1, 1) * along
        values, slopes = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(total)))(points))
    assert np.isfinite(slopes).all()
    difference = (values[2] - values[0]) / (2 * H)
    # The iteration's slope is less accurate than its value; its docstring says how accurate.
    near = 1e-3 if name.startswith("spectra") else 1e-5
    np.testing.assert_allclose(np.vdot(slopes[1], along), difference, rtol=near, atol=1e-6)
