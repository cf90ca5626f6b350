"""Laws of adaptive clips: no statistic can be poisoned, and no block is locked out forever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from tests.cases import ADAPTIVE, HOLDERS, OTHERS
from tests.series import POISONS, steps_to_recover

each_adaptive = pytest.mark.parametrize("case", ADAPTIVE, ids=lambda case: case.name)
each_scope = pytest.mark.parametrize(
    "scope", [optaxclip.scopes.tree, optaxclip.scopes.leaf], ids=["tree", "leaf"]
)


@pytest.mark.slow
@each_adaptive
@each_scope
def test_bounds_recover_from_every_poison(case, scope):
    found = steps_to_recover(case.make(scope=scope), 200 + case.within + 200, case.relative)
    assert len(found) == len(POISONS)
    late = {name: steps for name, (steps, _) in found.items() if steps > case.within}
    assert not late
    assert all(sound for _, sound in found.values())


@pytest.mark.slow
@each_adaptive
def test_constant_norms_for_ten_thousand_steps(case):
    """The deviation of constant norms is pure rounding error."""
    tx, grads = (
        case.make(scope=optaxclip.scopes.leaf),
        {"a": jnp.array([3.7, 0.1]), "b": jnp.array([1e-3])},
    )

    def step(state, _):
        _, state = tx.update(grads, state, grads)
        return state, None

    state, _ = jax.lax.scan(step, tx.init(grads), None, length=10_000)
    updates, state = tx.update(grads, state, grads)
    assert all(not jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(state))
    for name, grad in grads.items():
        before, after = np.linalg.norm(grad), np.linalg.norm(updates[name])
        assert case.relative or before / 1.2 < after <= before * (1 + 1e-6), name


# These have numbers in units of the gradient: a cap, an initial bound, an ε. Moments of norms turn
# a norm into a ratio, which is the same at any scale.
ABSOLUTE = {"autoclip after", "adagc", "quantile_clip", "normalize_by_moments", "scale_by_acclip"}
ABSOLUTE |= {"u_clip by element", "smooth_clip", "clippy", "spectral_clip"}
RELATIVE = (
    {case.name: case.make for case in ADAPTIVE} | OTHERS | {"skip_spikes": HOLDERS["skip_spikes"]}
)
RELATIVE = {name: make for name, make in RELATIVE.items() if name not in ABSOLUTE}
SCALES = np.array([1, 1e-6, 1e4, 1e-30, 1e30], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELATIVE)
def test_scale_does_not_matter(name):
    """Gradients of any magnitude are clipped on the same steps, by the same factor."""
    tx, params = RELATIVE[name](), jnp.ones(4)
    grads = jnp.exp(0.5 * jax.random.normal(jax.random.key(0), (300, 4)))
    grads *= jnp.where(jnp.arange(300) == 280, 50, 1)[:, None]

    def run(scale):
        def step(state, grad):
            updates, state = tx.update(grad * scale, state, params)
            return state, updates / scale

        return jax.lax.scan(step, tx.init(params), grads)[1]

    first, *others = jax.jit(jax.vmap(run))(SCALES)
    assert jnp.any(jnp.abs(first - grads) > 0.1 * grads)
    for scale, updates in zip(SCALES[1:], others, strict=True):
        if name != "adamw_clip" or scale > 1e-10:  # its floor
            np.testing.assert_allclose(updates, first, rtol=1e-3, err_msg=str(scale))
