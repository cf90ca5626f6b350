"""Laws of adaptive clips: no statistic can be poisoned, and none locks a block out for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from tests.cases import ADAPTIVE
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
    """The deviation of constant norms is nothing but rounding."""
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


@pytest.mark.slow
@each_adaptive
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(case, scale):
    """Gradients of any magnitude are clipped by the same factor, but for absolute defaults."""
    grads = (
        jnp.exp(0.5 * jax.random.normal(jax.random.key(0), (300, 4)))
        * jnp.where(jnp.arange(300) == 280, 50, 1)[:, None]
    )
    tx = case.make(scope=optaxclip.scopes.tree)

    def run(scale):
        def step(state, grad):
            _, state = tx.update(grad * scale, state, grad)
            return state, optaxclip.metrics(state, prefix="")["factor"]

        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    factors = jax.jit(jax.vmap(run))(jnp.array([1.0, scale]))
    assert jnp.all(jnp.isfinite(factors))
    if case.name not in (
        "autoclip after",
        "adagc",
        "adagc relearning",
        "quantile_clip",
        "normalize_by_moments",
    ):
        np.testing.assert_allclose(factors[0], factors[1], rtol=1e-3)
