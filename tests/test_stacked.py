"""A model that stacks its layers is clipped like the same model with its layers in a list."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import scopes, xla
from optaxclip.xla.scaling import _number_copies
from tests.conftest import AS_USERS

LAYERS = 3
RNG = np.random.default_rng(0)
LIST = {
    "blocks": [
        {
            "bias": jnp.asarray(RNG.normal(size=2), jnp.float32) * (i + 1),
            "kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.bfloat16),
        }
        for i in range(LAYERS)
    ],
    "head": {"kernel": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)},
}
STACKED = scopes.stacked("^blocks")


def stack(tree, axis=0):
    """The layers of a tree as one, with an axis that numbers them."""
    layers = jax.tree.map(lambda *xs: jnp.stack(xs, axis), *tree["blocks"])
    return tree | {"blocks": layers}


def renamed(metrics):
    """The metrics of the stacked tree by the names of those of the list."""
    return {re.sub(r"blocks(.*)\[(\d)\]", r"blocks/\2\1", k): x for k, x in metrics.items()}


FACTORS = (1.0, 3.0, jnp.inf, 20.0)


def run(tx, grads):
    """The updates and the metrics of each of a few steps."""

    def step(state, factor):
        now = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, state = tx.update(now, state, grads)
        return state, (updates, oc.metrics(state))

    return jax.lax.scan(step, tx.init(grads), jnp.array(FACTORS))[1]


CLIPS = {
    "smooth linf": lambda **k: oc.clip_by(1.0, norm=jnp.inf, action=oc.actions.smooth(2.0), **k),
    "zero l1": lambda **k: oc.clip_by(4.0, norm=1, nonfinite="zero", action=oc.actions.zero, **k),
    "rms": lambda **k: oc.clip_by(0.7, norm=oc.norms.rms, **k),
    "param_relative": lambda **k: oc.clip_by(oc.thresholds.param_relative(1.5), **k),
    "zclip": oc.zclip,
    "clip_by_momentum_norm": oc.clip_by_momentum_norm,
}
GROUPS = scopes.groups(lambda path: "head" if path.startswith("head") else path.rpartition("/")[0])
BY_SCOPE = {"leaf": (scopes.leaf, CLIPS), "groups": (GROUPS, {"zclip": oc.zclip})}


@pytest.mark.parametrize("name", BY_SCOPE)
def test_each_layer_is_clipped_as_the_layer_of_a_list(name):
    """All in one program: rules learn by layer, a layer of parameters is the measure of its own."""
    scope, clips = BY_SCOPE[name]

    def everything(grads, scope):
        return {name: run(make(scope=scope), grads) for name, make in clips.items()}

    want = jax.jit(lambda: everything(LIST, scope))()
    got = jax.jit(lambda: everything(stack(LIST), scopes.stacked("^blocks", scope)))()
    for name, (updates, seen) in want.items():
        steps = [jax.tree.map(lambda x, i=i: x[i], updates) for i in range(len(FACTORS))]
        want_updates = jax.tree.map(lambda *xs: jnp.stack(xs), *map(stack, steps))
        chex.assert_trees_all_close(got[name][0], want_updates, rtol=1e-5, custom_message=name)
        chex.assert_trees_all_close(renamed(got[name][1]), seen, rtol=1e-5, custom_message=name)


def test_singular_values_by_layer_have_bounds_and_statistics_of_their_own():
    def make(**stacked):
        return oc.spectral_clip(oc.thresholds.running(1.2), **stacked)

    want, seen = jax.jit(lambda: run(make(), LIST))()
    got, metrics = jax.jit(lambda: run(make(stacked={"^blocks": 1}), stack(LIST, 1)))()
    steps = [jax.tree.map(lambda x, i=i: x[i], want) for i in range(len(FACTORS))]
    want = jax.tree.map(lambda *xs: jnp.stack(xs), *(stack(step, 1) for step in steps))
    chex.assert_trees_all_close(got, want, rtol=1e-2, atol=1e-5)
    chex.assert_trees_all_close(renamed(metrics), seen, rtol=1e-5)


BOUNDS = {
    "a tree with lists": {
        "blocks": {"bias": [0.1, 0.2, 0.3], "kernel": [1.0, 2.0, 3.0]},
        "head": {"kernel": 0.5},
    },
    "a tree with vectors": {
        "blocks": {"bias": np.array([0.1, 0.2, 0.3]), "kernel": jnp.array([1.0, 2.0, 3.0])},
        "head": {"kernel": 0.5},
    },
    "one for all and one for a layer": {
        "blocks/bias[0]": 0.1,
        "blocks/bias[1]": 0.2,
        "blocks/bias": 0.3,
        "blocks/kernel": [1.0, lambda step: jnp.float32(2.0), oc.thresholds.constant(3.0)],
        "head/kernel": 0.5,
    },
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
def test_a_bound_for_each_layer(bounds):
    tx, grads = oc.clip_by_leaf_norm(bounds, stacked="^blocks"), stack(LIST)
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(state.metrics.clip_bound, [0.1, 0.2, 0.3, 1, 2, 3, 0.5])


def test_groups_of_layers_have_bounds_and_names():
    grads, label = stack(LIST), {"^blocks": "blocks", "head": "head"}
    tx = oc.clip_by_group_norm({"blocks": [0.1, 9.0, 9.0], "head": 1.0}, label, stacked="^blocks")
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    seen = oc.metrics(state)
    for i, layer in enumerate(LIST["blocks"]):
        norm = oc.global_norm(layer)
        np.testing.assert_allclose(seen[f"clip/grad_norm/blocks[{i}]"], norm, rtol=1e-6)
    assert seen["clip/clipped/blocks[0]"] == 1 and seen["clip/clipped/blocks[1]"] == 0
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1:], updates["blocks"]),
        jax.tree.map(lambda x: x[1:], grads["blocks"]),
    )


def test_a_bad_layer_poisons_itself_only():
    grads = stack(LIST)
    bias = grads["blocks"]["bias"].at[1, 0].set(jnp.nan)
    grads |= {"blocks": grads["blocks"] | {"bias": bias}}
    tx = oc.clip_by(oc.thresholds.norm_ratio(), scope=STACKED)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert np.isnan(updates["blocks"]["bias"]).all(axis=1).tolist() == [False, True, False]
    assert not np.isnan(updates["blocks"]["kernel"]).any()
    seen = {k for k, x in oc.metrics(state).items() if "nonfinite_steps/" in k and x}
    assert seen == {"clip/nonfinite_steps/blocks/bias[1]"}
    assert state.threshold.blocks.seen.tolist() == [1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("axes", [-1, (2, 0)], ids=str)
def test_any_axis_may_number_the_layers(axes):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    tx = oc.clip_by(2.0, scope=scopes.stacked({"w": axes}))
    updates, state = jax.jit(tx.update)({"w": x}, tx.init({"w": x}))
    kept = {axes % 3} if isinstance(axes, int) else set(axes)
    norms = np.sqrt((np.asarray(x) ** 2).sum(tuple({0, 1, 2} - kept), keepdims=True))
    np.testing.assert_allclose(updates["w"], x * np.minimum(1, 2 / norms), rtol=1e-6)
    last = f"[{','.join(str(x.shape[axis] - 1) for axis in sorted(kept))}]"
    seen = oc.metrics(state)[f"clip/grad_norm/w{last}"]
    np.testing.assert_allclose(seen, norms.ravel()[-1], rtol=1e-6)


@pytest.mark.parametrize(
    "spec", [P("x"), P(None, "x", "y"), P("y", "x")], ids=["layers", "within", "both"]
)
def test_only_norms_travel_between_devices(spec):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    grads = {"blocks": jnp.arange(512.0).reshape(8, 16, 4) - 200, "head": jnp.ones((16, 4))}
    specs = {"blocks": spec, "head": P("x")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = oc.clip_by(3.0, scope=STACKED)

    def step(grads):
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.metrics.grad_norm

    compiled = jax.jit(step).lower(jax.device_put(grads, shardings)).compile(AS_USERS)
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(rf"= (.*) (?:{kinds})(?:-start)?\(", compiled.as_text())
    # Each has one axis, and at most the nine norms, padded to four parts of three.
    lengths = [int(n or 1) for shapes in collectives for n in re.findall(r"\[([\d,]*)\]", shapes)]
    assert lengths and max(lengths) <= 12, collectives
    got = compiled(jax.device_put(grads, shardings))
    chex.assert_trees_all_close(got, step(grads), rtol=1e-6)
    assert got[0]["blocks"].sharding.is_equivalent_to(shardings["blocks"], 3)


def test_leaves_of_one_shape_and_block_read_factors_of_their_own():
    """They may be cut in different ways. XLA:TPU moved the factors of the layers from one to the
    other on a mesh of 64 x 8, a copy as large as a leaf; no simulated device does.
    """
    paths, shapes = ["h/q", "h/o", "h/up"], [(6, 8, 8), (6, 8, 8), (6, 8, 32)]
    for scope, copies in [(scopes.groups({"h": "all"}), [0, 1, 0]), (scopes.leaf, [0, 0, 0])]:
        blocks = scopes.stacked("h", scope).cut(paths, shapes)
        assert _number_copies(xla.lay_out(blocks, paths, shapes)) == copies


def test_in_shard_map_names_say_what_is_cut():
    mesh = Mesh(jax.devices()[:4], "x")
    grads, specs = {"blocks": jnp.arange(64.0).reshape(4, 8, 2)}, {"blocks": P(None, "x")}
    tx = oc.clip_by(3.0, scope=STACKED, axis_names="x")

    def inside(tx):
        run = jax.shard_map(
            lambda g: tx.update(g, None)[0], mesh=mesh, in_specs=(specs,), out_specs=specs
        )
        return jax.jit(run)

    alone = jax.jit(lambda g: oc.clip_by(3.0, scope=STACKED).update(g, None)[0])
    chex.assert_trees_all_close(inside(tx)(grads), alone(grads), rtol=1e-6)
    with pytest.raises(ValueError, match=r"inside shard_map.* scopes.stacked\(..., over=...\)"):
        inside(oc.clip_by(3.0, scope=STACKED))(grads)


CUT = {  # where leaves lie, over which mesh axes their layers are cut, over which each is inside
    "layers": ({"blocks": P("x"), "head": P()}, "x", {"blocks": (), "head": ()}),
    "over two axes": ({"blocks": P(("y", "x")), "head": P("x")}, ("y", "x"), {"head": "x"}),
    "both": ({"blocks": P("x", None, "y"), "head": P("y")}, "x", {"blocks": "y", "head": "y"}),
    "within layers": ({"blocks": P(None, "x"), "head": P("y")}, (), {"blocks": "x", "head": "y"}),
}


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize(("specs", "over", "inside"), CUT.values(), ids=CUT.keys())
def test_in_shard_map_a_device_may_hold_some_of_the_layers(specs, over, inside, typed):
    """Updates and states are those of whole arrays."""
    grads = {"blocks": jnp.arange(64.0).reshape(4, 8, 2) - 20, "head": jnp.ones((4, 2))}
    names = None if typed else lambda path: inside.get(path, ())

    def clip(scope, names=None):
        clip = oc.clip_by(oc.thresholds.norm_ratio(), scope=scope, axis_names=names)
        return optax.chain(oc.watch(scope=scope, histogram=True, axis_names=names), clip)

    alone, tx = clip(STACKED), clip(scopes.stacked("^blocks", over=over), names)
    run = functools.partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y")),
        check_vma=typed,
    )
    update = run(lambda g, s: tx.update(g, s), in_specs=(specs, P()), out_specs=(specs, P()))
    want = jax.jit(alone.update)(grads, alone.init(grads))
    chex.assert_trees_all_close(jax.jit(update)(grads, tx.init(grads)), want, rtol=1e-6)
    init = run(tx.init, in_specs=(specs,), out_specs=P())
    chex.assert_trees_all_equal_shapes(jax.eval_shape(init, grads), want[1])


TREE = {"blocks": jnp.ones((2, 3)), "wide": jnp.ones((3, 3)), "gain": jnp.ones(())}


def test_axes_of_one_size_and_other_names_have_their_own_layouts():
    tx = oc.clip_by(1.0, scope=scopes.stacked("blocks", over="x"), axis_names=())

    def clip(grads):
        return tx.update(grads, tx.init(grads))[0]

    for name, layers in {"x": 4, "y": 2}.items():  # only "x" cuts them: two on a device, either way
        grads = {"blocks": jnp.arange(6.0 * layers).reshape(layers, 6)}
        spec = {"blocks": P("x") if name == "x" else P()}
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
        form = {"mesh": mesh, "axis_names": {name}, "check_vma": False}
        run = jax.shard_map(clip, in_specs=(spec,), out_specs=spec, **form)
        chex.assert_trees_all_close(jax.jit(run)(grads), clip(grads), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scopes.stacked(["^blocks"]), r"where must be .* got the list \['\^blocks'\]"),
        (lambda: scopes.stacked({"^blocks": "0"}), "where must be"),
        (lambda: scopes.stacked(scopes.groups), r"where must be .*: write groups\("),
        (lambda: scopes.stacked("^b", over=0), "over must be mesh axes: .* got 0"),
        (lambda: scopes.stacked("^b", scopes.tree), "scope must be scopes.leaf, "),
        (lambda: scopes.stacked("^layers"), r"clip_by: none of the leaves \['blocks'.* stacks"),
        (lambda: scopes.stacked("gain"), r"leaf 'gain' of shape \(\) has no axes \(0,\)"),
        (lambda: scopes.stacked({"^b": 0, "s$": 1}), "'blocks' matches several rules"),
        (lambda: scopes.stacked("^b", scopes.stacked("^b")), "scope must be one of whole leaves"),
        (
            lambda: scopes.stacked("blocks|wide", scopes.groups(lambda path: "all")),
            r"the leaves of 'all' stack \(2,\) and \(3,\) layers: give them labels",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        oc.clip_by(1.0, scope=make()).init(TREE)


def test_a_watch_goes_by_layer():
    """Norms, culprits, histograms and plots of a stacked model are those of its layers."""
    rng = np.random.default_rng(0)
    tx = optax.chain(oc.watch(scope=STACKED, histogram=True), oc.clip_by_global_norm(1.0))
    state, update, history = tx.init(stack(LIST)), jax.jit(tx.update), oc.History()
    for step in range(20):
        grads = jax.tree.map(lambda g: g * jnp.asarray(rng.uniform(1, 1.1), g.dtype), LIST)
        if step == 15:
            grads["blocks"][2]["kernel"] *= 100
        if step == 18:
            grads["blocks"][1]["bias"] = jnp.full(2, jnp.nan)
        _, state = update(stack(grads), state)
        history.append(oc.metrics(state))
    (episode,) = oc.monitoring.bad_steps(state)
    assert episode.first.step == 16 and episode.first.block == "blocks/kernel[2]"
    assert episode.worst.step == 19 and episode.worst.block == "blocks/bias[1]"
    assert oc.diagnose(history)[0].block == "blocks/bias[1]"
    own = oc.watch(scope=scopes.leaf, histogram=True)
    want = oc.loggers.histograms(jax.jit(own.update)(grads, own.init(grads))[1]).counts
    got = renamed(oc.loggers.histograms(state).counts)
    assert got.keys() == want.keys()
    for name, counts in want.items():
        np.testing.assert_array_equal(got[name], counts)
    ticks = oc.plots.plot_layers(history).get_yticklabels()
    assert "blocks/kernel[2]" in [tick.get_text() for tick in ticks]


def test_histograms_by_layer_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    grads = {"kernel": jnp.arange(32.0).reshape(4, 4, 2), "kernel_2": jnp.ones((4, 4, 2))}
    tx = oc.watch(scope=scopes.stacked("kernel"), histogram=True)
    want = jax.jit(tx.update)(grads, tx.init(grads))[1].histogram
    with jax.set_mesh(mesh):
        spread = jax.device_put(grads, NamedSharding(mesh, P("x", "y")))
        got = jax.jit(tx.update)(spread, tx.init(spread))[1].histogram
    np.testing.assert_array_equal(got, want)
