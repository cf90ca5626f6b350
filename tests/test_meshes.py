"""All clips at once on meshes of several shapes: one compiled program for each mesh gives the
numbers of one device.
"""

import math
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from tests.benchmarks.running import count_all_reduces
from tests.cases import ADAPTIVE, CASES, HOLDERS, OTHERS
from tests.conftest import AS_USERS

GRADS = {
    "bias": jnp.arange(4.0),
    "experts": jax.random.normal(jax.random.key(1), (8, 2, 4)),
    "kernel": jax.random.normal(jax.random.key(0), (8, 4)),
}
MESHES = {"8": ((8,), ("x",)), "2x4": ((2, 4), ("x", "y")), "4x2x1": ((4, 2, 1), ("x", "y", "z"))}
LAYOUTS = {
    "8": {"bias": P(), "experts": P("x"), "kernel": P("x")},
    "2x4": {"bias": P("y"), "experts": P("x"), "kernel": P("x", "y")},
    "4x2x1": {"bias": P(), "experts": P(("x", "y")), "kernel": P("x", "z")},
}
CLIPS = {case.name: case.make(scope=oc.scopes.leaf) for case in ADAPTIVE if " " not in case.name}
CLIPS |= {
    case.name: case.make(1.0)
    for case in CASES
    if " " not in case.name and case.name.startswith(("clip", "ada"))
}
CLIPS |= {
    name: (OTHERS | HOLDERS)[name]()
    for name in (
        *("adamw_clip", "clippy", "smooth_clip", "clip_by_running_max", "spectral_clip"),
        *("clip_by_median by params", "larc", "skip_spikes", "clip_params"),
        "spectral_clip adaptive",
    )
}
CLIPS |= {
    "clip_by_global_norm linf": oc.clip_by_global_norm(1.0, norm=jnp.inf),
    "zclip tree": oc.zclip(),
    "autoclip units": oc.autoclip(window=4, scope=oc.scopes.units()),
}


def mesh_of(name, kind=AxisType.Auto):
    shape, names = MESHES[name]
    return jax.make_mesh(
        shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[: math.prod(shape)]
    )


def two_steps(clips, grads, in_scan=True):
    """Two updates of each clip: the second ones, and what was seen."""

    def run(tx):
        def step(state, factor):
            updates, state = tx.update(jax.tree.map(lambda g: g * factor, grads), state, grads)
            return state, (updates, oc.metrics(state))

        if not in_scan:
            return step(step(tx.init(grads), 1.0)[0], 3.5)[1]
        return jax.tree.map(
            lambda x: x[-1], jax.lax.scan(step, tx.init(grads), jnp.array([1.0, 3.5]))[1]
        )

    return {name: run(tx) for name, tx in clips.items()}


# One bad number, on one of the devices.
BAD = [
    GRADS | {leaf: GRADS[leaf].at[place].set(bad)}
    for leaf, place, bad in [
        ("kernel", (0, 0), jnp.nan),
        ("kernel", (7, 3), jnp.nan),
        ("experts", (5, 1, 2), jnp.inf),
    ]
]


@pytest.fixture(scope="module")
def alone():
    """The results on one device, as a function of the gradients."""
    return jax.jit(lambda grads: two_steps(CLIPS, grads))


def close(got, want):
    for name in want:
        chex.assert_trees_all_close(
            got[name], want[name], rtol=2e-5, atol=1e-5, custom_message=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sharded_under_jit(alone, name):
    mesh = mesh_of(name)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), LAYOUTS[name], is_leaf=lambda x: isinstance(x, P)
    )
    run = jax.jit(lambda grads: two_steps(CLIPS, grads))
    got = run(jax.device_put(GRADS, shardings))
    close(got, alone(GRADS))
    for grads in BAD:
        close(run(jax.device_put(grads, shardings)), alone(grads))
    updates, _ = got["clip_by_global_norm"]
    assert jax.tree.all(
        jax.tree.map(lambda u, s: u.sharding.is_equivalent_to(s, u.ndim), updates, shardings)
    )


# Units need `axis_names=` (see `test_mesh.py`), and matrices must be whole.
IN_PARTS = {
    name: tx
    for name, tx in CLIPS.items()
    if name not in ("adaptive_grad_clip", "autoclip units") and "spectral" not in name
}
# Their states have the shapes of the parameters and start as zeros that do not vary over devices,
# so a scan cannot carry them.
LARGE = ("clip_by_momentum_norm", "u_clip", "clip21", "adamw_clip", "skip_spikes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x4", "4x2x1"])
def test_in_shard_map(alone, name):
    layout = LAYOUTS[name]
    small, large = (
        {n: tx for n, tx in IN_PARTS.items() if (n in LARGE) == wanted} for wanted in (False, True)
    )

    def run(grads):
        return two_steps(small, grads) | two_steps(large, grads, in_scan=False)

    run = jax.shard_map(
        run,
        mesh=mesh_of(name),
        in_specs=(layout,),
        out_specs=dict.fromkeys(IN_PARTS, (layout, P())),
    )
    run = jax.jit(run)
    for grads in (GRADS, *BAD):
        want = alone(grads)
        close(run(grads), {n: want[n] for n in IN_PARTS})


ROWS = CLIPS | {case.name: case.make(1.0) for case in CASES}
ROWS |= {case.name: case.make() for case in ADAPTIVE}
ROWS |= {name: make() for name, make in (OTHERS | HOLDERS).items()}


def shapes_on(mesh, layout):
    shapes = jax.eval_shape(lambda: GRADS)
    return {
        name: shapes[name].update(sharding=NamedSharding(mesh, spec))
        for name, spec in layout.items()
    }


def state_on(mesh, tx, params):
    """The state of `init` under `jit`, as shapes that lie on the mesh by their types."""
    # JAX 0.12 makes zeros that lie nowhere outside a context.
    with jax.set_mesh(mesh):
        made = jax.jit(tx.init).trace(params)
    shapes, structure = jax.tree.flatten(made.out_info)
    lie = [NamedSharding(mesh, x.sharding.spec) for x in made.jaxpr.out_avals]
    return structure.unflatten([x.update(sharding=s) for x, s in zip(shapes, lie, strict=True)])


WHOLE = dict.fromkeys(GRADS, P())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_states_that_lie_on_a_mesh_need_no_context(kind):
    """All rows, outside `jax.set_mesh`: also where a state is cut and gradients are not."""
    mesh, cut = mesh_of("2x4", kind), LAYOUTS["2x4"]
    for layout, others in ((cut, [cut, WHOLE]), (WHOLE, [cut])):
        params = shapes_on(mesh, layout)
        for tx in ROWS.values():
            state = state_on(mesh, tx, params)
            for other in others:
                jax.jit(tx.update).trace(shapes_on(mesh, other), state, params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map_may_leave_axes_to_jit(kind):
    """All rows that need no names of axes, in a `shard_map` over one of two axes."""
    mesh, inside = mesh_of("2x4", kind), {"bias": P(), "experts": P("x"), "kernel": P("x")}
    named = re.compile("unit|adaptive_grad_clip|at_most$|stacked|spectral")
    for tx in [tx for name, tx in ROWS.items() if not named.search(name)]:

        def step(grads, tx=tx):
            return tx.update(grads, tx.init(grads), grads)[0]

        run = jax.shard_map(step, mesh=mesh, in_specs=(inside,), out_specs=inside, axis_names={"x"})
        jax.jit(run).trace(shapes_on(mesh, LAYOUTS["2x4"]))


def test_updates_without_jit_need_no_context():
    """With Explicit axes, where an operation must know its devices from its arguments."""
    mesh, grad = mesh_of("2x4", AxisType.Explicit), GRADS["kernel"]
    for spec, tx in ((P("x", "y"), oc.clip(0.5)), (P(), oc.zclip(scope=oc.scopes.leaf))):
        lies = NamedSharding(mesh, spec)
        spread = jax.device_put(grad, lies)
        # The second update is the first whose state lies on the mesh.
        got, want = (tx.update(g, tx.update(g, tx.init(g))[1])[0] for g in (spread, grad))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.sharding.is_equivalent_to(lies, 2)


def test_explicit_sharding(alone):
    """With explicit axes, updates have the sharding types of the gradients."""
    mesh = mesh_of("2x4", AxisType.Explicit)
    clips = {
        n: CLIPS[n]
        for n in (
            "clip_by_global_norm",
            "clip_by_leaf_norm",
            "zclip",
            "autoclip",
            "clip",
            "adaptive_grad_clip",
            "autoclip units",
            "spectral_clip",
        )
    }
    with jax.set_mesh(mesh):
        grads = jax.tree.map(
            lambda spec, g: jax.device_put(g, NamedSharding(mesh, spec)),
            LAYOUTS["2x4"],
            GRADS,
            is_leaf=lambda x: isinstance(x, P),
        )
        got = jax.jit(lambda g: two_steps(clips, g))(grads)
    want = alone(GRADS)
    close(jax.tree.map(np.asarray, got), {n: want[n] for n in clips})
    for updates, _ in got.values():
        assert jax.tree.all(
            jax.tree.map(
                lambda u, g: jax.typeof(u).sharding.spec == jax.typeof(g).sharding.spec,
                updates,
                grads,
            )
        )


def _clip_until(steps):
    return oc.clip_by(oc.thresholds.until(steps, oc.thresholds.norm_ratio(decay=steps / 4)))


def _clip_by_name(bound):
    learned = oc.thresholds.running(2.0)
    return oc.clip_by_leaf_norm({"bias": bound, "experts": learned, "kernel": 2 * bound})


WITH_NUMBERS = {
    "adagc": (oc.adagc, {"warmup_steps": 1, "relearn_after": 3}),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, {"clipping": 0.1}),
    "band_clip": (oc.band_clip, {"low": 0.5}),
    "clip": (oc.clip, {"max_delta": 0.5}),
    "until": (_clip_until, {"steps": 1}),
    "by name": (_clip_by_name, {"bound": 0.5}),
    "clip_by_global_norm": (oc.clip_by_global_norm, {"max_norm": 1.0}),
    "clip_by_log_zscore": (oc.clip_by_log_zscore, {"z": 2.0}),
    "clippy": (oc.clippy, {}),
    "clip_by_value": (oc.clip_by_value, {"lower": -0.5, "upper": 0.5}),
    "limit_norm_growth": (oc.limit_norm_growth, {}),
    "quantile_clip": (oc.quantile_clip, {"quantile": 0.4}),
    "smooth_clip": (oc.smooth_clip, {"max_norm": 1.0}),
    "zclip": (oc.zclip, {"z": 1.5, "warmup_steps": 1}),
}


def test_explicit_sharding_with_injected_numbers():
    """Arrays that a clip closes over are of the Explicit mesh, its own code is not."""
    mesh = mesh_of("2x4", AxisType.Explicit)
    plain = {n: make(**w) for n, (make, w) in WITH_NUMBERS.items()}
    injected = {n: optax.inject_hyperparams(make)(**w) for n, (make, w) in WITH_NUMBERS.items()}

    def init(clips, grads):
        return {n: tx.init(grads) for n, tx in clips.items()}

    def run(clips, grads, states):
        return {n: tx.update(grads, states[n], grads)[0] for n, tx in clips.items()}

    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS["2x4"].items()}
        grads = jax.device_put(GRADS, shardings)
        got = jax.jit(partial(run, injected))(grads, init(injected, grads))
    want = jax.jit(partial(run, plain))(GRADS, init(plain, GRADS))
    close(jax.tree.map(np.asarray, got), want)


@pytest.mark.parametrize(
    ("scope", "cuts"),
    [
        (oc.scopes.units(), [P(None), P(None, None, None), P(None, "y")]),
        (oc.scopes.element, [P(None, "y"), P(None, "x", None, None), P(None, "x", "y")]),
    ],
    ids=["units", "element"],
)
def test_norms_lie_where_their_units_do(scope, cuts):
    """With Explicit axes as well: an update keeps them there, and to read them gathers nothing."""
    tx, mesh = oc.zclip(scope=scope), mesh_of("2x4", AxisType.Explicit)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS["2x4"].items()}

    def step(grads, state):
        _, state = tx.update(grads, state)
        return state, oc.metrics(state)

    with jax.set_mesh(mesh):
        grads = jax.device_put(GRADS, shardings)
        state = jax.jit(tx.init)(grads)
        compiled = jax.jit(step).lower(grads, state).compile(AS_USERS)
        new, seen = compiled(grads, state)
    assert [jax.typeof(x).sharding.spec for x in state.metrics.grad_norm] == cuts
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    want = jax.jit(lambda grads: step(grads, tx.init(grads))[1])(GRADS)
    chex.assert_trees_all_close(seen, want, rtol=1e-6)


def test_rematerialisation_and_cond():
    """A clip inside `jax.checkpoint` and inside a branch has the derivative that it has outside."""
    tx = CLIPS["clip_by_leaf_norm"]

    def through(grads):
        return sum(jnp.sum(jnp.sin(u)) for u in jax.tree.leaves(tx.update(grads, None)[0]))

    def branched(grads):
        return jax.lax.cond(grads["bias"][1] > 0, jax.checkpoint(through), lambda grads: 0.0, grads)

    both = jax.jit(lambda grads: (jax.grad(branched)(grads), jax.grad(through)(grads)))
    chex.assert_trees_all_close(*both(GRADS), rtol=1e-6, atol=1e-7)


def collectives(function, grads):
    """The number of all-reduces that run. The branch for unusual magnitudes has no more, and there
    are no other collectives.
    """
    compiled = jax.jit(function).lower(grads).compile(AS_USERS)
    text, run = compiled.as_text(), count_all_reduces(compiled)
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) <= 2 * run
    return run


@pytest.mark.parametrize(("name", "most"), [("8", 1), ("2x4", 3), ("4x2x1", 3)])
@pytest.mark.parametrize("clip", ["clip_by_global_norm", "clip_by_leaf_norm", "zclip", "autoclip"])
def test_collectives_under_jit(name, most, clip):
    """One for each set of axes over which leaves are sharded; nothing is gathered."""
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh_of(name), spec),
        LAYOUTS[name],
        is_leaf=lambda x: isinstance(x, P),
    )
    grads, tx = jax.device_put(GRADS, shardings), CLIPS[clip]
    assert 1 <= collectives(lambda grads: tx.update(grads, tx.init(grads))[0], grads) <= most


@pytest.mark.parametrize("name", ["2x4", "4x2x1"])
@pytest.mark.parametrize("clip", ["clip_by_global_norm", "clip_by_leaf_norm", "zclip"])
def test_one_collective_in_shard_map(name, clip):
    """For any mix of sharded and replicated leaves."""
    tx, layout = CLIPS[clip], LAYOUTS[name]
    run = jax.shard_map(
        lambda grads: tx.update(grads, tx.init(grads))[0],
        mesh=mesh_of(name),
        in_specs=(layout,),
        out_specs=layout,
    )
    assert collectives(run, GRADS) == 1
