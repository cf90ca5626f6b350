"""Laws of the rows under JAX's transformations and inside Optax's wrappers; one program covers
several of these at once.
"""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import optaxclip
from tests.cases import CASES, ROWS

# One row of each kind, because each takes a second to compile.
KINDS = ["clip_by_leaf_norm", "adaptive_grad_clip", "zclip", "skip_spikes", "watch"]
each_kind = pytest.mark.parametrize("make", [ROWS[name] for name in KINDS], ids=KINDS)
PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, 0.5)}
STEPS = 3


pytestmark = pytest.mark.usefixtures("as_users")  # Optax's transformations promote dtypes


def draw_grads(*batch):
    """Gradients of a few steps, the last one a spike."""
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 0.1, 50.0]).reshape(STEPS, *[1] * (len(batch) + 1))

    def leaf(p):
        g = rng.normal(size=(STEPS, *batch, *p.shape))
        return jnp.asarray(g * sizes.reshape(STEPS, *[1] * (g.ndim - 1)), p.dtype)

    return jax.tree.map(leaf, PARAMS)


def step_of(tx):
    """One update at fixed parameters, in the form that `scan` takes."""

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    return step


def scan(tx, grads):
    """All steps in one program: the last state, and the updates of each step."""
    return jax.lax.scan(step_of(tx), tx.init(PARAMS), grads)


def assert_close(got, want):
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-6)


FIXED = {case.name for case in CASES if not case.history}


@pytest.mark.parametrize("name", KINDS)
def test_healthy_gradients_pass_checkify_and_the_nan_checks(name):
    tx, grads = ROWS[name](), draw_grads()
    checked = jax.jit(checkify.checkify(lambda g: scan(tx, g), errors=checkify.float_checks))
    # Learned bounds may start at infinity; a fixed bound never needs one.
    with jax.debug_nans(True), jax.debug_infs(name in FIXED):
        error, (state, updates) = checked(grads)
        seen = optaxclip.metrics(state) if jax.tree.leaves(state) else {}
    error.throw()
    assert all(not np.isnan(x).any() for x in seen.values())


# Only one fixed bound per scope: the arithmetic is in the thresholds.
SEARCHED = {
    name: make
    for name, make in ROWS.items()
    if name not in FIXED or name in ("clip_by_global_norm", "clip_by_leaf_norm", "clip_by units")
}


@pytest.mark.slow
@pytest.mark.parametrize("make", SEARCHED.values(), ids=SEARCHED.keys())
def test_healthy_gradients_pass_debug_nans_op_by_op(make):
    """This is how `jax.debug_nans` locates a NaN, and it would blame one that a select discards."""
    tx, params = make(), jnp.ones((3, 2))
    with jax.debug_nans(True), jax.disable_jit():
        _, state = tx.update(params, tx.init(params), params)
        # A spike and zeros.
        jax.vmap(lambda factor: tx.update(factor * params, state, params))(jnp.array([1e3, 0.0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIXED - {"at_most"}))  # one of its two bounds is infinite
def test_fixed_bounds_pass_debug_infs_op_by_op(name):
    tx, params = ROWS[name](), jnp.ones((3, 2))
    with jax.debug_infs(True), jax.disable_jit():
        for factor in (1.0, 1e3, 0.0):
            tx.update(factor * params, tx.init(params), params)


each_row = pytest.mark.parametrize("name", ROWS)


@each_row
def test_every_row_keeps_its_types_in_all_transformations_at_once(name):
    """Traced only; values are tested below, for one row of each kind."""
    inner = optax.conditionally_transform(ROWS[name](), lambda step: step >= 0)
    tx = optax.apply_if_finite(optax.MultiSteps(inner, 1).gradient_transformation(), 2)

    @jax.checkpoint
    def step(state, grads):
        take, leave = step_of(tx), lambda state, grads: (state, grads)
        return jax.lax.cond(grads["bias"][0] > 0, take, leave, state, grads)

    def train(grads):
        state, updates = jax.lax.scan(step, tx.init(PARAMS), grads)
        return updates, optaxclip.metrics(state) if jax.tree.leaves(
            ROWS[name]().init(PARAMS)
        ) else {}

    grads = draw_grads(2)
    updates, seen = jax.eval_shape(jax.vmap(train, in_axes=1, axis_name="runs"), grads)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(lambda g: g.swapaxes(0, 1).shape, grads)
    # Each metric is one number per run.
    assert {x.shape for x in seen.values()} <= {(2,)}


def test_every_row_is_exported_for_every_platform():
    """In one program. No device is needed to lower for one: nothing in a row is for CPUs alone."""

    def step_of_each(grads):
        def step(tx):
            updates, state = tx.update(grads, tx.init(grads), grads)
            return updates, jax.tree.leaves(state)

        return {name: step(make()) for name, make in ROWS.items()}

    platforms = ("cpu", "tpu", "cuda")
    exported = jax.export.export(jax.jit(step_of_each), platforms=platforms)(PARAMS)
    assert exported.platforms == platforms
    there, here = jax.eval_shape(exported.call, PARAMS), jax.eval_shape(step_of_each, PARAMS)
    assert jax.tree.map(jnp.shape, there) == jax.tree.map(jnp.shape, here)


def test_an_exported_clip_gives_the_same_numbers():
    tx, grads = optaxclip.zclip(), {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    state = tx.init(grads)
    exported = jax.export.export(jax.jit(tx.update), platforms=("cpu", "cuda"))(grads, state)
    chex.assert_trees_all_close(exported.call(grads, state), tx.update(grads, state), rtol=1e-6)


class Layer(nnx.Module):
    def __init__(self):
        self.params = nnx.data({name: nnx.Param(p) for name, p in PARAMS.items()})


@each_row
def test_every_row_is_traced_in_nnx_jit(name):
    def train():
        model, tx = Layer(), optax.chain(ROWS[name](), optax.scale(-0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.state(model, nnx.Param))

        step(model, optimizer)
        step(model, optimizer)  # with the state from the first step
        return model

    assert nnx.to_pure_dict(nnx.state(nnx.eval_shape(train)))["params"].keys() == PARAMS.keys()


@each_row
def test_with_explicit_axes_updates_keep_their_sharding(name):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Explicit,))
    specs = {"bias": P(), "kernel": P("data")}

    def step(params):
        params = jax.tree.map(lambda p, spec: jax.sharding.reshard(p, spec), params, specs)
        updates = update(ROWS[name](), params)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert jax.typeof(u).sharding == jax.typeof(p).sharding
        return updates

    with jax.set_mesh(mesh):
        jax.eval_shape(step, {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))})


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def update(tx, params):
    return tx.update(params, tx.init(params), params)[0]


@each_row
def test_axes_of_one_device_need_no_axis_names(name):
    step, params = functools.partial(update, ROWS[name]()), {"w": jnp.ones((4, 2))}
    for typed in (True, False):
        spec = {"in_specs": P("data"), "out_specs": P("data")}
        jax.eval_shape(jax.shard_map(step, mesh=mesh_of(1), check_vma=typed, **spec), params)
    # brax trains this way.
    each = jax.tree.map(lambda p: p[None], params)
    jax.eval_shape(jax.pmap(step, axis_name="data", devices=jax.devices()[:1]), each)


def scan_parts(tx, kernel):
    """A loop in `shard_map`, which fails where an update changes the type of its input or state."""
    specs = {"bias": P(), "kernel": kernel}

    def run(params):
        def step(carry, _):
            return tx.update(*carry, params), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    run = jax.shard_map(run, mesh=mesh_of(2), in_specs=(specs,), out_specs=specs)
    jax.eval_shape(run, {"bias": jnp.ones(2), "kernel": jnp.ones((4, 4))})


@each_row
def test_a_replicated_leaf_beside_sharded_ones_stays_replicated_by_type(name):
    why = ""
    try:
        scan_parts(ROWS[name](), P("data"))
    except ValueError as error:
        why = str(error)
    assert not why or re.match(r"\w+: [^\n]*axis_names", why)


T = optaxclip.thresholds
BOUNDS = {
    "number": 1.0,
    "schedule": lambda step: 1.0,
    "window": T.percentile(50.0, window=3),
    "counter": T.until(3, 1.0, T.running(2.0)),
    "Optax's": optax.ema(0.9),
    "computed": optax.GradientTransformation(
        lambda norms: jax.tree.map(lambda n: 2 * n, norms), lambda norms, state, _: (norms, norms)
    ),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_is_kept_of_units_varies_by_type_from_the_start(bound):
    for scope, names in (
        (optaxclip.scopes.element, None),
        (optaxclip.scopes.units(), lambda _: ()),
    ):
        tx = optaxclip.clip_by(BOUNDS[bound], scope=scope, axis_names=names)
        scan_parts(tx, P(None, "data"))


def test_where_one_device_has_no_finite_unit_all_count_the_step():
    tx = optaxclip.clip_by(lambda step: 1.0, scope=optaxclip.scopes.element)

    def count(grads):
        return tx.update(grads, tx.init(grads))[1].threshold.clip_step

    run = jax.shard_map(count, mesh=mesh_of(2), in_specs=P("data"), out_specs=P())
    assert jax.jit(run)(jnp.array([jnp.nan, 1.0])) == 1


@each_row
def test_without_types_it_is_local_or_asks_for_axis_names(name):
    step = functools.partial(update, ROWS[name]())
    spec = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    run = jax.shard_map(step, mesh=mesh_of(2), **spec)
    params = {"w": jnp.arange(8.0).reshape(4, 2)}
    try:
        program = jax.make_jaxpr(run)(params)
    except ValueError as error:
        call, message = str(error).split(": ", 1)
        rooms = (optaxclip, optaxclip.thresholds, optaxclip.wrappers)
        public = next(getattr(room, call) for room in rooms if hasattr(room, call))
        assert "axis_names" in inspect.signature(public).parameters
        assert "axis_names=()" in message
    else:
        # It clips by element, so each device can handle its own shard.
        jaxpr = str(program)
        assert not any(word in jaxpr for word in ("reduce_sum", "reduce_max", "dot_general"))


@each_kind
def test_vmap_remat_and_cond_change_nothing(make):
    tx, grads = make(), draw_grads(2)

    @jax.checkpoint
    def step(state, grads):
        (state, i), take = state, step_of(tx)
        # The branch without the clip returns the state unchanged, so the clip must keep its types.
        leave = lambda state, grads: (state, grads)  # noqa: E731
        state, updates = jax.lax.cond(i < STEPS - 1, take, leave, state, grads)
        return (state, i + 1), updates

    def train(grads):
        (state, _), updates = jax.lax.scan(step, (tx.init(PARAMS), 0), grads)
        return state, updates

    @jax.jit
    def run(grads):
        return jax.vmap(train, in_axes=1)(grads), train(jax.tree.map(lambda g: g[:, 1], grads))

    (state, updates), alone = run(grads)
    assert_close(jax.tree.map(lambda x: x[1], (state, updates)), alone)
    if jax.tree.leaves(state):
        seen, of_one = optaxclip.metrics(state), optaxclip.metrics(alone[0])
        assert seen.keys() == of_one.keys()
        assert all(x.shape == (2,) for x in seen.values())
        assert_close({key: x[1] for key, x in seen.items()}, of_one)


@each_kind
def test_wrappers_of_optax_and_export_change_nothing(make):
    tx, grads = make(), draw_grads()
    inner = optax.conditionally_transform(tx, lambda step: step >= 0)
    inner = optax.MultiSteps(inner, 1).gradient_transformation()
    wrapped = optax.apply_if_finite(inner, 2)

    def both(grads):
        # `jax.export` takes dicts, but states are named tuples that are not registered.
        state, updates = scan(wrapped, grads)
        alone, want = scan(tx, grads)
        read = [optaxclip.metrics(s) if jax.tree.leaves(alone) else {} for s in (state, alone)]
        return {"got": [updates, read[0]], "want": [want, read[1]]}

    out = jax.export.export(jax.jit(both))(grads).call(grads)
    assert_close(out["got"], out["want"])


@each_kind
def test_nnx_jit_and_scan_change_nothing(make):
    class Model(nnx.Module):
        def __init__(self):
            self.params = nnx.data({name: nnx.Param(p) for name, p in PARAMS.items()})

    model, tx = Model(), optax.chain(make(), optax.scale(-0.1))
    optimizer, grads = nnx.Optimizer(model, tx, wrt=nnx.Param), draw_grads()

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def train(both, grads):
        model, optimizer = both
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, {"params": grads})
        optimizer.update(model, state)
        return both

    train((model, optimizer), grads)

    @jax.jit
    def alone(params, grads):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    assert_close(nnx.to_pure_dict(nnx.state(model))["params"], alone(PARAMS, grads))
