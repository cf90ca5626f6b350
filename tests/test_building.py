"""Laws of construction, `init` and `update`, for every row of the table, as large models and
wrappers use them.
"""

import functools
import subprocess
import sys
from collections.abc import Callable

import chex
import cloudpickle
import equinox as eqx
import flax.core
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxclip
from tests.cases import ADAPTIVE, ROWS, program_lines

each_row = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS.keys())
PARAMS = {
    "embed": {"table": jnp.ones((5, 3))},
    "layers": [{"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)} for _ in range(2)],
}


def grads_at(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


pytestmark = pytest.mark.usefixtures("as_users")  # Optax's transformations promote dtypes


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@each_row
def test_init_takes_shapes(make):
    tx = make()
    want = shapes(tx.init(PARAMS))
    of_shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    assert shapes(jax.eval_shape(tx.init, PARAMS)) == want
    assert shapes(jax.eval_shape(tx.init, of_shapes)) == want


def assert_same_program(tx, other):
    """Both transformations are traced to the same first update, with the same constants in it."""
    one, two = (
        jax.make_jaxpr(lambda grads, tx=tx: tx.update(grads, tx.init(PARAMS), PARAMS))(PARAMS)
        for tx in (tx, other)
    )
    assert list(program_lines(one.jaxpr)) == list(program_lines(two.jaxpr))
    chex.assert_trees_all_equal(one.consts, two.consts)


@each_row
def test_building_under_jit_leaks_no_tracer(make):
    built = []

    def build():
        built.append(make())
        return built[0].init(PARAMS)

    jax.eval_shape(build)
    assert_same_program(built[0], make())


@each_row
def test_it_can_be_pickled_after_use(make):
    """Some trainers pickle themselves to save a run, or to start other processes."""
    tx = make()
    step_in_shapes(tx, PARAMS)
    assert_same_program(cloudpickle.loads(cloudpickle.dumps(tx)), tx)


@functools.partial(jax.jit, donate_argnums=0)
def donate(state):
    return jax.lax.optimization_barrier(state)


@each_row
def test_two_states_can_be_donated(make):
    """Every leaf has a buffer of its own, which no later state shares."""
    tx = make()
    for state in (tx.init(PARAMS), tx.init(PARAMS)):
        donate(state)


def count_late_compilations(tx):
    """How many programs the third un-jitted update compiles."""
    params = PARAMS["layers"][0]  # two leaves, because each of their shapes costs a compilation
    state, compiled = tx.init(params), []

    def note(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for step in range(3):
            compiled.clear()
            _, state = tx.update(grads_at(step)["layers"][0], state, params)
        return len(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@each_row
def test_eager_updates_compile_nothing_after_the_second(make):
    assert count_late_compilations(make()) == 0


@each_row
def test_map_params_maps_only_leaves_shaped_like_parameters(make):
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
def test_map_params_before_init_works_or_says_what_to_call(make):
    state, tx, why = jax.eval_shape(make().init, PARAMS), make(), None
    try:
        got = optax.tree.map_params(tx, lambda x: x, state)
    except ValueError as error:
        why = str(error)
        jax.eval_shape(tx.init, PARAMS)
        got = optax.tree.map_params(tx, lambda x: x, state)
    assert shapes(got) == shapes(state)
    assert why is None or "jax.eval_shape(tx.init, params)" in why


def step_in_shapes(tx, params):
    """One update, traced but not run."""
    jax.eval_shape(lambda: tx.update(params, tx.init(params), params))


class Model(eqx.Module):
    weight: jax.Array
    name: str = eqx.field(static=True, default="")


@each_row
def test_empty_trees_and_groups(make):
    tx = make()
    step_in_shapes(tx, {})
    step_in_shapes(tx, {"none": None, "no_numbers": jnp.zeros((0, 3))})
    frozen, weight = flax.core.freeze({"w": jnp.ones(3)}), nnx.State({"w": nnx.Param(jnp.ones(3))})
    for params in (frozen, Model(jnp.ones(3)), weight):
        step_in_shapes(optax.masked(tx, jax.tree.map(lambda _: False, params)), params)
    # One group has no members, the other has them all.
    step_in_shapes(optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"w": "b"}), {"w": jnp.ones(3)})


@pytest.mark.parametrize("case", ADAPTIVE, ids=lambda case: case.name)
def test_a_learned_bound_by_unit_accepts_an_empty_tree(case):
    step_in_shapes(case.make(scope=optaxclip.scopes.units()), {})


@each_row
def test_numpy_arrays_and_python_numbers_are_gradients(make):
    tx, grads = make(), {"w": np.ones((3, 2), np.float32), "s": 1.0}
    if make is ROWS["clip_by stacked"]:  # a number has no layers
        del grads["s"]
    # Closed over, because `eval_shape` turns its arguments into tracers.
    shapes = jax.eval_shape(lambda: tx.update(grads, tx.init(grads), grads)[0])
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, grads)


class Unfiltered(eqx.Module):
    """A typical Equinox model, in which functions and strings are leaves."""

    weight: jax.Array
    bias: jax.Array
    activation: Callable = jax.nn.relu
    name: str = "dense"
    size: int = 3


@each_row
def test_unfiltered_models_work_or_the_error_names_the_filter(make):
    model, tx = Unfiltered(jnp.ones((3, 2)), jnp.ones(2)), make()
    params = eqx.filter(model, eqx.is_inexact_array)
    jax.eval_shape(lambda: tx.update(params, tx.init(params), model))
    why = None
    try:
        state = tx.init(model)
        jax.eval_shape(lambda: tx.update(params, state, params)[0])
    except ValueError as error:
        why = str(error)
    assert why is None or "eqx.filter(model, eqx.is_inexact_array)" in why


@each_row
def test_random_keys_work_or_the_error_names_the_filter(make):
    def run(tx):
        params = {"key": jax.random.key(0), "w": jnp.ones((3, 2))}
        return jax.eval_shape(lambda: tx.update(params, tx.init(params), params)[0]["key"])

    why = None
    try:
        run(make())
    except ValueError as error:
        why = str(error)
        run(optax.masked(make(), {"key": False, "w": True}))
    assert why is None or "PRNG keys. Pass only the arrays: for an Equinox model" in why


@each_row
def test_the_state_survives_a_round_trip_through_flat_dicts(make):
    state = make().init(PARAMS)
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested, sep="/", keep_empty_nodes=True)
    back = flax.traverse_util.unflatten_dict(flat, sep="/")
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(state, back), state)


@each_row
def test_the_state_of_another_transformation_is_rejected(make):
    tx = make()
    other = optaxclip.clip_by_leaf_norm(1.0).init({"x": jnp.ones(3)})
    adam = optax.adam(0.1).init(PARAMS)
    for state in (optax.EmptyState(), {}, other, adam, (other, other, other), tx):
        with pytest.raises(ValueError, match=r"^[\w.]+: [^\n]*init") as error:
            tx.update(grads_at(0), state, PARAMS)
        assert "Equinox" not in str(error.value)


@each_row
def test_the_error_names_the_owner_of_a_foreign_state(make):
    """Ours while the transformation is alive, those of Optax always."""
    tx, other = make(), optaxclip.clip_by_value(0.0, lambda step: 1.0)
    state, name = tx.init(PARAMS), tx.update.description.name
    # The state of the first fits `other`; that of the second is the state of its clip.
    if name not in ("clip_by_value", "clip_params"):
        with pytest.raises(ValueError, match=rf"state of ([\w. ]* )?{name}\b"):
            other.update(grads_at(0), state, PARAMS)
    with pytest.raises(ValueError, match=r"ScaleByAdamState of optax\.scale_by_adam"):
        other.update(grads_at(0), optax.adam(0.1).init(PARAMS), PARAMS)


@each_row
def test_a_missing_state_is_rejected_where_there_is_a_history(make):
    tx = make()
    if _forgets(tx.init(PARAMS)):
        tx.update(grads_at(0), None, PARAMS)
    else:
        with pytest.raises(ValueError, match=r"state = tx.init\(params\)"):
            tx.update(grads_at(0), None, PARAMS)


def _forgets(state):
    """Whether this is the state of a clip whose threshold has none."""
    return isinstance(state, optaxclip.base.ClipState) and not jax.tree.leaves(state.threshold)


def test_building_a_row_initializes_no_backend():
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
    """It rebuilds the clip at every update, so compiled functions must not be keyed on closures."""
    assert count_late_compilations(INJECTED[name]()) == 0
