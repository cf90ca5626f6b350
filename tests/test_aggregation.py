"""Each client clips its own gradient before the average, and some clients lie."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip.aggregation import AggregateState, centered_clip, clip21_sgd2m, clipped_mean
from optaxclip.compat import to_varying, write_to_varying
from tests import attacks, reference

N, TAU, AXIS = 4, 1.0, "clients"
PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
ROWS, SPECS = AggregateState(None, 0), AggregateState(P(), P(AXIS))
OPTIONS = {
    "clipped_mean": (clipped_mean, {}),
    "centered_clip": (centered_clip, {"momentum": 0.8}),
    "centered_clip twice": (centered_clip, {"momentum": 0.8, "iterations": 2}),
    "clip21_sgd2m": (clip21_sgd2m, {"momentum": 0.8, "rate": 0.5}),
}
each_method = pytest.mark.parametrize("name", OPTIONS)
# How far one message may move the mean, in multiples of the bound.
WEIGHT = {"centered_clip twice": 2, "clip21_sgd2m": 0.5}


def make(name, clip=None, axis=AXIS, **options):
    method, usual = OPTIONS[name]
    return method(oc.clip_by_global_norm(TAU) if clip is None else clip, axis, **usual | options)


def draw(steps=6, clients=N):
    """Gradients that drift and differ by more than the bound: (steps, clients, numbers)."""
    rng = np.random.default_rng(0)
    drift = np.linspace(0.1, 4, steps)[:, None, None] * rng.normal(size=8)
    return drift + 2 * rng.normal(size=(steps, clients, 8))


def as_tree(rows):
    rows = jnp.asarray(rows, jnp.float32)
    return {"w": rows[..., :6].reshape(*rows.shape[:-1], 2, 3), "b": rows[..., 6:]}


def as_rows(tree):
    return np.concatenate([tree["w"].reshape(*tree["w"].shape[:-2], 6), tree["b"]], axis=-1)


def play(tx, grads, params=PARAMS):
    """The output of each step, as one client sees it; gradients are (steps, ...)."""

    def step(state, grad):
        out, state = tx.update(grad, state, params)
        return state, out

    state, out = lax.scan(step, tx.init(params), grads)
    return out, state


def simulate(tx, rows):
    """The same for rows of gradients, with all clients on one device."""
    run = jax.vmap(partial(play, tx), 1, (None, ROWS), axis_name=AXIS)
    out, state = jax.jit(run)(as_tree(rows))
    return as_rows(out), state


@each_method
def test_every_method_matches_its_paper(name):
    rows = draw()
    method, options = OPTIONS[name]
    oracle = getattr(reference, method.__name__)
    want = oracle(rows, **options)
    assert np.abs(want - oracle(rows, np.inf, **options)).max() > 0.1  # the clip was active
    got, _ = simulate(make(name), rows)
    np.testing.assert_allclose(got, want, atol=1e-6)


@each_method
def test_devices_match_a_simulation_and_agree_by_type(name):
    """The state crosses the border of `shard_map` twice; the optimizer is fed the mean."""
    tx = optax.chain(make(name), optax.trace(0.9))
    mesh, specs = Mesh(jax.devices()[:N], AXIS), (SPECS, P())
    start = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs))

    def step(grads, state):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    run = jax.shard_map(step, mesh=mesh, in_specs=(P(AXIS), specs), out_specs=(P(), specs))
    state, rows, outs = start(PARAMS), draw(2), []
    for row in rows:
        out, state = jax.jit(run, donate_argnums=1)(as_tree(row), state)
        outs.append(as_rows(out))
    want, _ = simulate(make(name), rows)
    np.testing.assert_allclose(outs, [want[0], want[1] + 0.9 * want[0]], atol=1e-6)
    seen = oc.metrics(state)
    assert seen["clip/grad_norm"].shape == (N,)  # each client's own
    assert len(set(seen["clip/grad_norm"].tolist())) == N


def test_a_client_may_be_spread_over_devices():
    mesh = Mesh(np.array(jax.devices()).reshape(N, 2), (AXIS, "model"))
    tx, rows = make("clip21_sgd2m"), draw(3)
    params = {"w": P(), "b": P("model")}
    grads = {"w": P(None, AXIS), "b": P(None, AXIS, "model")}

    def run(grads, params):
        return play(tx, jax.tree.map(lambda g: g[:, 0], grads), params)[0]

    specs = {"in_specs": (grads, params), "out_specs": {"w": P(), "b": P(None, "model")}}
    out = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(as_tree(rows), PARAMS)
    np.testing.assert_allclose(as_rows(out), simulate(tx, rows)[0], atol=1e-6)


@pytest.mark.parametrize("typed", [False, True], ids=["without types", "with types"])
def test_clients_along_two_axes_with_and_without_types(typed):
    mesh = Mesh(np.array(jax.devices()[:N]).reshape(2, 2), ("x", "y"))
    tx, rows = make("centered_clip", axis=("x", "y")), draw(3)

    def run(grads):
        return play(tx, jax.tree.map(lambda g: g[:, 0], grads))[0]

    specs = {"in_specs": P(None, ("x", "y")), "out_specs": P(), "check_vma": typed}
    out = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(as_tree(rows))
    np.testing.assert_allclose(as_rows(out), simulate(make("centered_clip"), rows)[0], atol=1e-6)


def test_each_device_may_hold_several_clients():
    mesh, tx, rows = Mesh(jax.devices()[:2], "x"), make("clip21_sgd2m", axis=("x", "y")), draw(3)

    def run(grads):
        return jax.vmap(partial(play, tx), 1, (None, ROWS), axis_name="y")(grads)

    specs = {"in_specs": P(None, "x"), "out_specs": (P(), AggregateState(P(), P("x")))}
    specs["check_vma"] = False  # with types JAX has no collective along an axis of vmap
    out, state = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(as_tree(rows))
    want, known = simulate(make("clip21_sgd2m"), rows)
    np.testing.assert_allclose(as_rows(out), want, atol=1e-6)
    chex.assert_trees_all_close(state, known, atol=1e-6)


def test_pmap_takes_the_name_of_its_axis():
    rows = draw(3)
    out, _ = jax.pmap(partial(play, make("centered_clip")), AXIS, in_axes=1)(as_tree(rows))
    want, _ = simulate(make("centered_clip"), rows)
    for seen in as_rows(out):
        np.testing.assert_allclose(seen, want, atol=1e-6)


CLIPS = {
    "by value": (oc.clip(0.3), lambda g: np.clip(g, -0.3, 0.3)),
    "by leaf": (
        oc.clip_by_leaf_norm(TAU),
        lambda g: np.concatenate([reference.shorten(part, TAU) for part in (g[:6], g[6:])]),
    ),
    "with the name of their axis": (
        oc.clip_by_global_norm(TAU, axis_names=AXIS),
        lambda g: reference.shorten(g, TAU),
    ),
    "Optax's": (optax.clip_by_global_norm(TAU), lambda g: reference.shorten(g, TAU)),
    "that learns": (
        oc.clip_by(oc.thresholds.previous(1.0)),  # no bound at the first step
        lambda g: g,
    ),
    "in a chain": (
        optax.chain(optax.scale(2.0), oc.clip_by_global_norm(TAU)),
        lambda g: reference.shorten(2 * g, TAU),
    ),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_clients_may_use_any_transformation(kind):
    clip, expected = CLIPS[kind]
    rows = draw(1) * 4
    want = np.mean([expected(g) for g in rows[0]], axis=0)
    got, _ = simulate(clipped_mean(clip, AXIS), rows)
    np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_each_client_has_a_bound_of_its_own():
    clip = oc.clip_by(oc.thresholds.previous(1.5))
    rows = np.ones((2, N, 8)) * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    _, state = simulate(clipped_mean(clip, AXIS), rows)
    bounds = oc.metrics(state)["clip/bound"]
    np.testing.assert_allclose(bounds[:, 0], 1.5 * 8**0.5 * np.arange(1, 5), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wide_bound_gives_the_plain_mean(name):
    rows, plain = draw(3), {} if name == "clipped_mean" else {"momentum": 0.0}
    plain |= {"rate": 1.0} if name == "clip21_sgd2m" else {}
    got, _ = simulate(make(name, oc.clip_by_global_norm(1e6), **plain), rows)
    np.testing.assert_allclose(got, rows.mean(axis=1), atol=1e-6)


# What one client may send; each is (numbers,).
LIES = {
    "far away": np.full(8, 1e30),
    "the other way": np.full(8, -1e30),
    "NaN": np.full(8, np.nan),
    "one NaN": np.array([np.nan, *np.ones(7)]),
    "infinity": np.full(8, -np.inf),
    "too long for a float": np.full(8, 3e38),
    "nothing": np.zeros(8),
}


@each_method
def test_one_client_moves_the_mean_by_at_most_its_share(name):
    rows = np.stack([draw(2)] * (1 + len(LIES)))
    rows[1:, 1, 0] = list(LIES.values())
    run = jax.vmap(partial(play, make(name)), 1, (None, ROWS), axis_name=AXIS)
    out = as_rows(jax.jit(jax.vmap(run))(as_tree(rows))[0])
    assert np.isfinite(out).all()
    distances = np.linalg.norm(out[:, None, 1] - out[None, :, 1], axis=-1)
    most = WEIGHT.get(name, 1) * 2 * TAU / N
    assert 0.6 * most < distances.max() <= most * (1 + 1e-5)


def test_only_a_clip_before_it_and_a_guard_around_it_let_one_client_stop_the_others():
    """As `check` says."""
    clip, mean, sgd = oc.clip_by_global_norm(TAU), make("clipped_mean"), optax.sgd(1.0)
    places = {
        "clip before": optax.chain(clip, mean, sgd),
        "told clip before": optax.chain(oc.clip_by_global_norm(TAU, axis_names=()), mean, sgd),
        "guard around": oc.skip_nonfinite(optax.chain(mean, sgd)),
        "none": optax.chain(mean, sgd),
        "guard after": optax.chain(mean, oc.skip_nonfinite(sgd)),
    }

    def run(grads):
        return {name: tx.update(grads, tx.init(grads))[0] for name, tx in places.items()}

    specs = {"in_specs": P(AXIS), "out_specs": P(AXIS), "mesh": Mesh(jax.devices()[:N], AXIS)}
    out = jax.jit(jax.shard_map(run, **specs))(jnp.ones(N).at[0].set(jnp.nan))
    stopped = {name for name, moved in out.items() if not np.any(moved)}
    assert stopped == {"clip before", "told clip before", "guard around"}


@each_method
def test_one_nan_is_counted_and_leaves_no_trace_in_the_state(name):
    rows = draw(4)
    rows[1, 0, 3] = np.nan
    out, state = simulate(make(name), rows)
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state) if x.dtype == jnp.float32)
    seen = oc.metrics(state)
    assert seen["clip/nonfinite_steps"].ravel().tolist() == [1, 0, 0, 0]
    assert seen["clip/steps"].ravel().tolist() == [4] * N  # only the first of two iterations counts


def test_a_clip_learns_of_the_first_iteration():
    rows = draw(2)
    once, twice = (simulate(make(f"centered_clip{often}"), rows[:1])[1] for often in ("", " twice"))
    chex.assert_trees_all_close(once.clients, twice.clients, atol=1e-6)
    # A learned bound takes effect at the next step; in the second iteration it would clip at once.
    learner = oc.thresholds.per_block(np.inf, lambda norm, bound: (bound, norm / 10))
    tx = make("centered_clip twice", oc.clip_by(learner), momentum=0.0)
    np.testing.assert_allclose(simulate(tx, rows)[0][0], rows[0].mean(axis=0), atol=1e-6)


def test_dtypes_and_non_gradients_are_preserved():
    grads = {"half": jnp.ones((N, 3), jnp.bfloat16), "count": jnp.arange(N), "none": None}
    params = {"half": jnp.ones(3, jnp.bfloat16), "count": jnp.int32(0), "none": None}
    tx = make("clip21_sgd2m")
    state = jax.vmap(tx.init, None, ROWS, axis_name=AXIS, axis_size=N)(params)
    out, new = jax.jit(jax.vmap(tx.update, (0, ROWS), (0, ROWS), axis_name=AXIS))(grads, state)
    assert out["half"].dtype == jnp.bfloat16 and out["count"].tolist() == list(range(N))
    assert new.mean["half"].dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)


def test_only_clip21_converges_to_the_mean_of_clients_that_differ():
    """Client i pulls the parameter towards aᵢ; one of them is far from the others."""
    wanted = jnp.array([0.0, 1.0, 2.0, 9.0])

    def descend(tx, wanted):
        def step(carry, _):
            w, state = carry
            out, state = tx.update(w - wanted, state)
            return (w - 0.1 * out, state), None

        w = jnp.zeros(())
        return lax.scan(step, (w, tx.init(w)), length=400)[0][0]

    def end(name):
        run = jax.vmap(partial(descend, make(name)), out_axes=None, axis_name=AXIS)
        return float(jax.jit(run)(wanted))

    assert abs(end("clip21_sgd2m") - 3) < 1e-3
    assert end("clipped_mean") < 1.6 and end("centered_clip") < 2


def test_a_gradient_that_does_not_vary_over_clients_is_rejected():
    def update(params, data, own):
        params = own(params)
        grads = jax.grad(lambda w: jnp.sum(w * data[0]))(params)
        tx = clipped_mean(oc.clip_by_global_norm(TAU), AXIS)
        return tx.update(grads, tx.init(params))[0]

    def run(own):
        step = partial(update, own=own)
        mapped = jax.shard_map(
            step, mesh=Mesh(jax.devices()[:N], AXIS), in_specs=(P(), P(AXIS)), out_specs=P()
        )
        return jax.jit(mapped)(jnp.ones(8), jnp.asarray(rows, jnp.float32))

    rows = draw(1)[0] * 3
    with pytest.raises(ValueError, match=re.escape(write_to_varying("params", (AXIS,)))):
        run(lambda params: params)
    want = reference.clipped_mean(rows[None])[0]
    np.testing.assert_allclose(run(lambda params: to_varying(params, [AXIS])), want, atol=1e-6)


def test_bad_arguments_are_rejected():
    tx = make("centered_clip")
    with pytest.raises(ValueError, match=r"aggregation.centered_clip: there is no axis .*vmap"):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"aggregation.clipped_mean: clip must be a trans"):
        clipped_mean(1.0, AXIS)
    with pytest.raises(ValueError, match="clip must be a transformation of gradients"):
        clipped_mean(oc.thresholds.running(), AXIS)
    with pytest.raises(ValueError, match="axis_name must be the axis of clients"):
        clipped_mean(oc.clip(1.0), 0)
    with pytest.raises(ValueError, match=r"centered_clip: momentum must be .* below 1, got 1"):
        make("centered_clip", momentum=1)
    with pytest.raises(ValueError, match="clip21_sgd2m: rate must be a number from 0 to 1, got 2"):
        make("clip21_sgd2m", rate=2)
    with pytest.raises(ValueError, match="centered_clip: this is not a state of"):
        tx.update(PARAMS, optax.EmptyState())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean, by value", "mean, by norm", "centered"])
def test_training_survives_every_attack(method):
    assert max(attacks.losses(method).values()) < 0.25  # 0.69 at the start


@pytest.mark.slow
def test_training_without_a_defence_does_not_survive():
    plain, momenta = attacks.losses("pmean"), attacks.losses("Clip21")
    for attack in ("sign flip", "scaled", "NaN", "inner product"):
        assert not plain[attack] < 5, attack
    assert momenta["sign flip"] > 5 and momenta["inner product"] > 5


@pytest.mark.slow
def test_momentum_defeats_an_attack_that_hides_in_the_noise():
    attack = "a little is enough"
    with_it, without = (attacks.losses(f"centered{name}") for name in ("", ", no momentum"))
    assert without[attack] - without["none"] > 4 * max(0, with_it[attack] - with_it["none"])
