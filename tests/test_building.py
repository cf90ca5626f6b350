"""Laws of building, initialising and stepping: every row of the table, as large models and wrappers
use it.
"""

import subprocess
import sys

import chex
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from tests import conftest as strict
from tests.cases import ROWS

each_row = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS.keys())
PARAMS = {
    "embed": {"table": jnp.ones((5, 3))},
    "layers": [{"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)} for _ in range(2)],
}


def grads_at(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


@pytest.fixture(autouse=True)
def _as_users():
    """Transformations of Optax's that some rows hold promote dtypes."""
    strict.set_promotion("standard", "allow")
    yield
    strict.set_promotion("strict", "raise")


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@each_row
def test_init_takes_shapes(make):
    tx = make()
    want = shapes(tx.init(PARAMS))
    of_shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    assert shapes(jax.eval_shape(tx.init, PARAMS)) == want
    assert shapes(jax.eval_shape(tx.init, of_shapes)) == want


@each_row
def test_built_inside_jit_it_leaks_nothing(make):
    kept = []

    @jax.jit
    def build():
        kept.append(make())
        return kept[0].init(PARAMS)

    state = build()
    updates, _ = kept[0].update(grads_at(0), state, PARAMS)
    want, _ = make().update(grads_at(0), make().init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, want, rtol=1e-6)


@each_row
def test_two_states_can_be_donated(make):
    tx = make()
    step = jax.jit(lambda state, grads: tx.update(grads, state, PARAMS)[1], donate_argnums=0)
    for state in (tx.init(PARAMS), tx.init(PARAMS)):
        step(state, grads_at(0))


def count_late_compilations(tx):
    """How many programs five un-jitted updates compile after the second."""
    state, compiled = tx.init(PARAMS), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        for step in range(5):
            if step == 2:
                compiled.clear()
            _, state = tx.update(grads_at(step), state, PARAMS)
        return len(compiled)
    finally:
        jax.monitoring.clear_event_listeners()


@each_row
def test_eager_updates_compile_nothing_after_the_second(make):
    assert count_late_compilations(make()) == 0


@each_row
def test_map_params_moves_only_what_is_like_the_parameters(make):
    tx = make()
    state = tx.init(PARAMS)
    known = {p.shape for p in jax.tree.leaves(PARAMS)}

    def double(x):
        assert x.shape in known
        return x * 2

    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    mapped = optax.tree.map_params(tx, double, state, transform_non_params=lambda x: x + 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(mapped, state)


@each_row
def test_the_state_goes_through_flat_dicts_and_back(make):
    state = make().init(PARAMS)
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested, sep="/", keep_empty_nodes=True)
    back = flax.traverse_util.unflatten_dict(flat, sep="/")
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(state, back), state)


@each_row
def test_the_state_of_something_else_is_refused(make):
    tx = make()
    if not jax.tree.leaves(tx.init(PARAMS)):
        pytest.skip("it has no state")
    for state in (optax.EmptyState(), optaxclip.clip_by_leaf_norm(1.0).init({"x": jnp.ones(3)})):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            tx.update(grads_at(0), state, PARAMS)


def test_building_every_row_starts_no_backend():
    code = (
        "import jax, optaxclip\n"
        "from tests.cases import ROWS\n"
        "for make in ROWS.values(): make()\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


INJECTED = {
    "clip_by_global_norm": lambda: optax.inject_hyperparams(optaxclip.clip_by_global_norm)(1.0),
    "clip_by_leaf_norm": lambda: optax.inject_hyperparams(optaxclip.clip_by_leaf_norm)(1.0),
    "adaptive_grad_clip": lambda: optax.inject_hyperparams(optaxclip.adaptive_grad_clip)(0.1),
    "clip": lambda: optax.inject_hyperparams(optaxclip.clip)(1.0),
    "zclip": lambda: optax.inject_hyperparams(optaxclip.zclip)(z=2.5, warmup_steps=2),
    "u_clip": lambda: optax.inject_hyperparams(optaxclip.u_clip)(1.0),
    "smooth_clip": lambda: optax.inject_hyperparams(optaxclip.smooth_clip)(1.0, p=4.0),
}


@pytest.mark.parametrize("name", INJECTED)
def test_under_inject_hyperparams_eager_updates_compile_nothing_late(name):
    """There a clip is built again at every update: what is compiled must not hang on closures."""
    assert count_late_compilations(INJECTED[name]()) == 0
