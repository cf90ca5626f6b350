"""The same numbers on every mesh: sharded arrays under jit, shard_map with and without types, pmap
and vmap.
"""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip.base import SizedView
from optaxclip.compat import to_varying
from optaxclip.norms import rms
from tests.conftest import AS_USERS

GRADS = {
    "dense": jnp.arange(32, dtype=jnp.float32).reshape(8, 4) - 9,
    "bias": jnp.arange(4, dtype=jnp.float32),
    "table": jnp.arange(16, dtype=jnp.float32).reshape(4, 4) / 3,
}
SPECS = {"dense": P("x", "y"), "bias": P(), "table": P("y")}
CLIPS = {
    "tree": optaxclip.clip_by_global_norm(1.0),
    "leaf": optaxclip.clip_by_leaf_norm(1.0),
    "groups": optaxclip.clip_by_group_norm(1.0, {"dense|bias": "a", "table": "b"}),
    "rms": optaxclip.clip_by_block_rms(0.5),
    "linf": optaxclip.clip_by_global_norm(1.0, norm=jnp.inf),
    "value": optaxclip.clip(2.0),
    "adaptive": optaxclip.clip_by(
        optaxclip.thresholds.at_most(optaxclip.thresholds.lag(optax.scale(1.5)), 3.0),
        scope=optaxclip.scopes.leaf,
    ),
}


def mesh_of(*shape):
    return Mesh(
        np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("x", "y")[: len(shape)]
    )


def steps(tx, grads):
    """Two updates of a clip from a fresh state: the second one's updates, and its metrics."""
    _, state = tx.update(grads, tx.init(grads), grads)
    updates, state = tx.update(jax.tree.map(lambda g: g * 2, grads), state, grads)
    return updates, optaxclip.metrics(state)


def spread(tx):
    """Two updates of each device's part, with the norms of the whole."""
    return jax.shard_map(
        partial(steps, tx), mesh=mesh_of(4, 2), in_specs=(SPECS,), out_specs=(SPECS, P())
    )


def on_one_device(tx, grads=GRADS):
    return jax.jit(partial(steps, tx))(grads)


@pytest.mark.parametrize("name", CLIPS)
def test_sharded_arrays_under_jit_give_the_numbers_of_one_device(name):
    tx, mesh = CLIPS[name], mesh_of(4, 2)
    sharded = {k: jax.device_put(g, NamedSharding(mesh, SPECS[k])) for k, g in GRADS.items()}
    updates, seen = jax.jit(partial(steps, tx))(sharded)
    chex.assert_trees_all_close((updates, seen), on_one_device(tx), rtol=1e-6)
    assert all(
        updates[k].sharding.is_equivalent_to(sharded[k].sharding, updates[k].ndim) for k in GRADS
    )


def test_sharded_arrays_cost_one_all_reduce():
    mesh, tx = mesh_of(8), CLIPS["tree"]
    grads = {i: jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x"))) for i in range(5)}
    text = jax.jit(lambda g: tx.update(g, None)[0]).lower(grads).compile(AS_USERS).as_text()
    ran = text[text.index("ENTRY") :]  # unusual magnitudes take a branch, which has its own
    assert len(re.findall(r" all-reduce(?:-start)?\(", ran)) == 1
    assert "all-gather" not in text


@pytest.mark.parametrize("name", CLIPS)
def test_shard_map_knows_from_the_types(name):
    run = jax.jit(spread(CLIPS[name]))
    chex.assert_trees_all_close(run(GRADS), on_one_device(CLIPS[name]), rtol=1e-6)


AGC = optaxclip.adaptive_grad_clip(1e-3)
WAYS = {name: (tx, partial(steps, tx)) for name, tx in {**CLIPS, "AGC": AGC}.items()}
WAYS |= {f"{name}, shard_map": (tx, spread(tx)) for name, tx in CLIPS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_number_on_one_device_is_seen_on_all(way):
    """Not by itself: where it takes a maximum, XLA:CPU's all-reduce drops NaN."""
    (tx, run), mesh = WAYS[way], mesh_of(4, 2)
    run, alone = jax.jit(run), jax.jit(partial(steps, tx))
    for leaf, place, bad in [
        ("dense", (0, 0), jnp.nan),
        ("dense", (7, 3), jnp.nan),
        ("table", (1, 2), jnp.nan),
        ("table", (3, 0), jnp.inf),
        ("bias", (1,), jnp.nan),
    ]:
        grads = GRADS | {leaf: GRADS[leaf].at[place].set(bad)}
        sharded = {k: jax.device_put(g, NamedSharding(mesh, SPECS[k])) for k, g in grads.items()}
        chex.assert_trees_all_close(run(sharded), alone(grads), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_shard_map_rescues_unusual_magnitudes(scale):
    """The second look at odd magnitudes contains a collective, so all devices must take it."""
    grads = jax.tree.map(lambda g: g * scale, GRADS)
    tx = optaxclip.clip_by_leaf_norm(scale)
    chex.assert_trees_all_close(jax.jit(spread(tx))(grads), on_one_device(tx, grads), rtol=1e-6)


NAMES = {"dense": ("x", "y"), "bias": (), "table": "y"}


@pytest.mark.parametrize("names", [NAMES, NAMES.get], ids=["tree", "function of the path"])
def test_shard_map_without_types_takes_names(names):
    tx = optaxclip.clip_by_global_norm(1.0, axis_names=names)
    run = jax.shard_map(
        partial(steps, tx),
        mesh=mesh_of(4, 2),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=False,
    )
    chex.assert_trees_all_close(jax.jit(run)(GRADS), on_one_device(CLIPS["tree"]), rtol=1e-6)


def by_root_mean_square(**names):
    """Its norm needs the size of the unsharded parameters."""
    threshold = optaxclip.thresholds.previous(1.1)
    return optaxclip.clip_by(threshold, view=SizedView(rms, lambda g, size: g * size), **names)


def by_element(**names):
    return optaxclip.u_clip(1.0, scope=optaxclip.scopes.units(()), **names)


@pytest.mark.parametrize("make", [by_root_mean_square, by_element])
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "named"])
def test_parameter_sizes_count_all_shards_and_elements_need_none(make, typed):
    # Each device holds another shard, so it decides about its own elements.
    grad, spec = GRADS["dense"], P("x", "y")
    tx = make() if typed else make(axis_names=("x", "y"))
    run = jax.shard_map(
        lambda grad: steps(tx, grad)[0],
        mesh=mesh_of(4, 2),
        in_specs=spec,
        out_specs=spec,
        check_vma=typed,
    )
    chex.assert_trees_all_close(jax.jit(run)(grad), on_one_device(make(), grad)[0], rtol=1e-6)


def test_a_global_norm_of_elements_is_that_of_all_devices():
    tx = optaxclip.adagc(scope=optaxclip.scopes.element)
    run = jax.shard_map(
        lambda grads: steps(tx, grads)[0], mesh=mesh_of(4, 2), in_specs=(SPECS,), out_specs=SPECS
    )
    chex.assert_trees_all_close(jax.jit(run)(GRADS), on_one_device(tx)[0], rtol=1e-6)


def test_shard_map_without_types_or_names_is_an_error():
    run = jax.shard_map(
        partial(steps, CLIPS["tree"]),
        mesh=mesh_of(4, 2),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"Pass axis_names= to the clip"):
        jax.eval_shape(run, GRADS)


def test_axis_names_override_a_varying_type():
    tx = optaxclip.clip_by_global_norm(1.0, axis_names=())

    def step(grads):
        varying = jax.tree.map(lambda g: to_varying(g, ["x"]), grads)
        updates, seen = steps(tx, varying)
        return jax.tree.map(lambda u: jax.lax.pmean(u, "x"), updates), seen

    run = jax.shard_map(step, mesh=mesh_of(4), in_specs=P(), out_specs=P())
    chex.assert_trees_all_close(jax.jit(run)(GRADS), on_one_device(CLIPS["tree"]), rtol=1e-6)


def test_the_derivative_goes_through_shard_map():
    tx = CLIPS["tree"]

    def loss(grads):
        return sum(jnp.sum(jnp.sin(u)) for u in jax.tree.leaves(tx.update(grads, None)[0]))

    def sharded(grads):
        u = jax.shard_map(
            lambda g: tx.update(g, None)[0], mesh=mesh_of(4, 2), in_specs=(SPECS,), out_specs=SPECS
        )(grads)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(u))

    both = jax.jit(lambda grads: (jax.grad(sharded)(grads), jax.grad(loss)(grads)))
    chex.assert_trees_all_close(*both(GRADS), atol=1e-6)


def test_units_in_shard_map_need_names_and_then_are_right():
    columns, rows = optaxclip.scopes.units(), optaxclip.scopes.units(axes=1)

    def clip(grads, scope, **names):
        return optaxclip.clip_by(1.0, scope=scope, **names).update(grads, None)[0]

    def in_parts(**options):
        spec = {"w": P("x", None)}
        clip_part = partial(clip, **options)
        return jax.shard_map(clip_part, mesh=mesh_of(4), in_specs=(spec,), out_specs=spec)

    params = {"w": GRADS["dense"]}
    with pytest.raises(ValueError, match="cannot know whether these cut units"):
        jax.eval_shape(in_parts(scope=columns), params)
    for scope, names in ((columns, "x"), (rows, ())):
        got = jax.jit(in_parts(scope=scope, axis_names=names))(params)
        want = jax.jit(partial(clip, scope=scope))(params)
        chex.assert_trees_all_close(got, want, rtol=1e-6)


def test_units_of_each_device_leave_shared_ones_the_same_by_type():
    """A replicated vector beside leaves of which each device holds its own, as experts."""
    specs = {"bias": P(), "expert": P("x")}
    grads = {"bias": GRADS["bias"], "expert": GRADS["dense"]}
    tx = optaxclip.clip_by(1.0, scope=optaxclip.scopes.units(...), axis_names=())

    def clip(grads):
        return tx.update(grads, tx.init(grads))[0]

    run = jax.shard_map(clip, mesh=mesh_of(8), in_specs=(specs,), out_specs=specs)
    apart = {"bias": grads["bias"], "expert": list(grads["expert"])}
    got, want = jax.jit(run)(grads), clip(apart)
    np.testing.assert_allclose(got["bias"], want["bias"], rtol=1e-6)
    np.testing.assert_allclose(got["expert"], np.stack(want["expert"]), rtol=1e-6)


def test_elements_are_clipped_without_a_collective():
    tx = optaxclip.zclip(scope=optaxclip.scopes.element)
    spec = NamedSharding(mesh_of(4, 2), P("x", "y"))
    grads = jax.device_put(GRADS["dense"], spec)
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile(AS_USERS)
    assert not re.search(r" (all|reduce|collective)-\w+(-start)?\(", compiled.as_text())
    (norms,) = compiled(grads, tx.init(grads))[1].metrics.grad_norm
    np.testing.assert_array_equal(norms[0], np.abs(GRADS["dense"]))
    assert norms.sharding.is_equivalent_to(NamedSharding(spec.mesh, P(None, "x", "y")), 3)


def test_pmap_and_vmap_take_the_name_of_their_axis():
    tx = optaxclip.clip_by_global_norm(1.0, axis_names="i")
    grads = GRADS["dense"].reshape(8, 1, 4)
    want = CLIPS["tree"].update(grads, None)[0]
    for mapped in (jax.vmap, jax.pmap):
        got = mapped(lambda g: tx.update(g, None)[0], axis_name="i")(grads)
        chex.assert_trees_all_close(jnp.asarray(got), want, rtol=1e-6)


def test_pmap_without_a_name_is_an_error():
    with pytest.raises(ValueError, match=r"axis_names=\(\) if .* axis_names=\('i',\) if"):
        jax.pmap(lambda g: CLIPS["tree"].update(g, None)[0], axis_name="i")(GRADS["dense"])


def in_x(update, grads):
    """In `shard_map` over the axis x, of which each device has a part."""
    return jax.shard_map(update, mesh=mesh_of(2), in_specs=P("x"), out_specs=P("x"))(grads)


ABSENT = {  # what binds the axes, the clip, and what the error says
    "shard_map": (in_x, lambda axis: optaxclip.zclip(axis_names=axis), "zclip: axis_names="),
    "for each leaf": (
        in_x,
        lambda axis: optaxclip.clip_by_global_norm(1.0, axis_names=lambda path: ("x", axis)),
        "clip_by_global_norm: axis_names=",
    ),
    "specs": (
        in_x,
        lambda axis: optaxclip.spectral_clip(1.0, specs=P(axis)),
        "spectral_clip: specs=",
    ),
    "layers": (
        in_x,
        lambda axis: optaxclip.clip_by(1.0, scope=optaxclip.scopes.stacked("", over=axis)),
        "clip_by: over=",
    ),
    "pmap": (
        lambda update, grads: jax.pmap(update, axis_name="x", devices=jax.devices()[:2])(grads),
        lambda axis: optaxclip.zclip(axis_names=axis),
        "zclip: axis_names=",
    ),
    "vmap": (
        lambda update, grads: jax.vmap(update, axis_name="x")(grads),
        lambda axis: optaxclip.zclip(axis_names=axis),
        "zclip: axis_names=",
    ),
}


@pytest.mark.parametrize("name", ABSENT)
def test_an_axis_that_is_not_there_is_an_error(name):
    """Which names the axes that are there, where JAX says which; of `vmap` it does not."""
    bind, clip, start = ABSENT[name]

    def run(axis):
        tx = clip(axis)
        return bind(lambda g: tx.update(g, tx.init(g))[0], jnp.ones((2, 3, 4)))

    there = "make axes" if name == "vmap" else r"axes \('x',\)"
    with pytest.raises(ValueError, match=f"{start} names 'ex', but .*{there}"):
        run("ex")
    run("x")


@pytest.mark.parametrize("names", [1, ["x", "x"], ["x", 1], lambda path: None])
def test_what_is_no_name_of_an_axis_is_an_error(names):
    tx = optaxclip.zclip(axis_names=names)
    with pytest.raises(ValueError, match=r"^zclip: axis_names must be one axis name or .* got"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
