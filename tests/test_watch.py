"""A watch keeps the right numbers, finds the planted culprit, and leaves gradients as they were."""

import pickle
from types import SimpleNamespace

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import scopes, thresholds
from optaxclip.monitoring.state import read_numbers, read_quantiles, read_top
from optaxclip.trees import unpack_names
from tests.conftest import AS_USERS
from tests.series import POISONS, factors

PARAMS = {f"layers/{i}": jnp.full((2, 2), 0.1 * (i + 1)) for i in range(12)} | {
    "embed": jnp.full((3,), 0.2)
}
NAMES = sorted(PARAMS)


def read(state):
    """All that a watch knows, by name."""
    numbers = read_numbers(state)
    blocks, shares = read_top(state, numbers)
    more = {"top_blocks": blocks, "top_shares": shares}
    return SimpleNamespace(**numbers._asdict(), **more, quantiles=read_quantiles(state, numbers))


def scaled(factor, **blocks):
    """Gradients in which some blocks are multiplied by more."""
    by_name = {name.replace("_", "/"): x for name, x in blocks.items()}
    return {
        name: g * jnp.asarray(factor * by_name.get(name, 1.0), g.dtype)
        for name, g in PARAMS.items()
    }


def norm_of(grads):
    return np.sqrt(
        sum(np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(grads))
    )


def lengths(steps=400, sigma=0.4, seed=0):
    return np.exp(sigma * np.random.default_rng(seed).normal(size=steps)).astype(np.float32)


def run(tx, series, start=None, tags=None):
    """The state after steps with these multiples of the gradients, and the metrics of each step."""

    def step(state, now):
        factor, tag = now
        _, state = tx.update(scaled(factor), state, PARAMS, tag=tag)
        return state, oc.metrics(state)

    tags = jnp.arange(len(series), dtype=jnp.int32) if tags is None else tags
    return jax.jit(lambda state: jax.lax.scan(step, state, (jnp.asarray(series), tags)))(
        start or tx.init(PARAMS)
    )


def test_updates_come_out_bit_for_bit():
    odd = {
        "half": jnp.array([1e-8, jnp.nan, jnp.inf, 3.0], jnp.bfloat16),
        "int": jnp.arange(3),
        "none": None,
        "phase": jnp.array([1 + 2j, -0.0]),
        "signed": jnp.array([-0.0, 1e-45]),
        "weak": jnp.asarray(1.5),
        "zero": jnp.zeros((0, 2)),
    }
    tx = oc.watch()
    out, _ = jax.jit(tx.update, compiler_options=AS_USERS)(odd, tx.init(odd))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, odd)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(odd), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.weak_type == b.weak_type


def test_norms_and_shares_are_numpys():
    tx, grads = oc.watch(top=4), scaled(3.0, layers_7=20.0, embed=5.0)
    _, state = tx.update(grads, tx.init(PARAMS))
    norms = np.array([norm_of(grads[name]) for name in NAMES])
    np.testing.assert_allclose(state.block_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(read(state).total_norm, norm_of(grads), rtol=1e-6)
    order = np.argsort(-norms)[:4]
    np.testing.assert_array_equal(read(state).top_blocks, order)
    np.testing.assert_allclose(
        read(state).top_shares,
        np.square(norms[order]) / np.sum(np.square(norms)),
        rtol=1e-5,
    )
    assert NAMES[read(state).top_blocks[0]] == "layers/7" and float(read(state).median_ratio) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e37])
def test_norms_of_any_size(scale):
    tx = oc.watch()
    _, state = tx.update(scaled(scale), tx.init(PARAMS))
    np.testing.assert_allclose(
        np.float64(read(state).total_norm) / scale, norm_of(PARAMS), rtol=1e-5
    )
    np.testing.assert_allclose(
        np.sum(np.asarray(read(state).top_shares)),
        3 * 0.0 + sum(_shares()[:3]),
        rtol=1e-5,
    )
    assert int(read(state).nonfinite.bad_total) == 0


def _shares():
    squares = sorted((norm_of(g) ** 2 for g in PARAMS.values()), reverse=True)
    return np.array(squares) / sum(squares)


def test_a_total_beyond_the_largest_float_is_finite_where_its_blocks_are():
    tx, grads = oc.watch(), {"a": jnp.full(4, 1.5e38), "b": jnp.full(4, 1.5e38)}
    _, state = tx.update(grads, tx.init(grads))
    assert (
        float(read(state).total_norm) == np.finfo(np.float32).max
        and int(read(state).nonfinite.bad_total) == 0
    )
    np.testing.assert_allclose(read(state).top_shares, 0.5)
    _, state = tx.update(
        grads | {"a": jnp.full(4, 3e38)}, state
    )  # its own norm is beyond the floats
    assert (
        int(read(state).nonfinite.bad_total),
        int(read(state).nonfinite.first),
        int(read(state).nonfinite.blocks_hit),
    ) == (1, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_planted_block_that_is_not_finite_is_found(bad):
    tx = oc.watch()
    state = tx.init(PARAMS)
    for step in range(4):
        grads = scaled(1.0) if step != 2 else scaled(1.0, layers_10=bad, layers_2=bad, layers_3=bad)
        _, state = tx.update(grads, state, tag=step * 11)
    found = read(state).nonfinite
    assert (int(found.bad_total), int(found.at_step), int(found.blocks_hit)) == (1, 3, 3)
    assert (NAMES[found.first], NAMES[found.last]) == ("layers/2", "layers/10")  # by number
    ((step, *_),) = oc.monitoring.bad_steps(state)
    assert step[:1] + step[3:] == (3, "layers/2", pytest.approx(1 / 3), 22) and not np.isfinite(
        step.norm
    )


def test_quantiles_are_near_numpys():
    for sigma, seed in ((0.2, 0), (0.5, 1)):
        series = lengths(600, sigma, seed)
        _, seen = run(oc.watch(quantiles=(0.05, 0.25, 0.5, 0.95)), series)
        for q in (0.05, 0.25, 0.5, 0.95):
            want = np.quantile(series, q) * norm_of(PARAMS)
            usual = np.exp(np.mean(np.log(seen[f"watch/quantile/{q}"][200:])))
            assert abs(np.log(usual / want)) < 0.25 * sigma, f"quantile {q}, sigma {sigma}"


CANDIDATES = {
    "2": 2.0,
    "log": thresholds.log_zscore(2.0),
    "mean": thresholds.running(1.5),
    "own": thresholds.lag(optax.chain(optax.ema(0.9), optax.scale(1.2))),
    "params": thresholds.param_relative(1.5),
    "step": lambda step: 1.0 + step.astype(float) / 100,
    "z": thresholds.zscore(2.5),
}


def discard(tx):
    """A clip whose result is dropped."""

    def update_fn(updates, state, params=None, **extra_args):
        return updates, tx.update(updates, state, params)[1]

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def test_candidates_in_shadow_are_the_clips_themselves():
    series = lengths(200)
    series[[50, 51, 120]] = [np.nan, 100, np.inf]
    with jax.numpy_dtype_promotion("standard"):  # `optax.ema` needs it
        clips = [oc.clip_by(threshold) for threshold in CANDIDATES.values()]
        seen = run(optax.chain(oc.watch(candidates=CANDIDATES), *map(discard, clips)), series)[1]
    for i, name in enumerate(CANDIDATES):
        np.testing.assert_allclose(
            seen[f"watch/would_clip/{name}"], seen[f"clip/{i}/clipped_fraction"], 1e-6, err_msg=name
        )


def test_rates_of_numbers_are_numpys():
    series = lengths(100)
    state, seen = run(oc.watch(candidates=(0.5, 1, 2.5)), series)
    norms = series * norm_of(PARAMS)
    for bound in (0.5, 1, 2.5):
        np.testing.assert_allclose(
            seen[f"watch/would_clip/{bound:g}"][-1], np.mean(norms > bound), rtol=1e-6
        )
    assert unpack_names(state.candidates) == ("0.5", "1", "2.5")


def test_groups():
    tx = oc.watch(scope=scopes.groups(lambda path: path.split("/")[0]))
    _, state = tx.update(scaled(1.0), tx.init(PARAMS))
    layers = [g for name, g in PARAMS.items() if name != "embed"]
    np.testing.assert_allclose(
        state.block_norms, [norm_of(PARAMS["embed"]), norm_of(layers)], rtol=1e-6
    )
    assert unpack_names(state.blocks) == ("embed", "layers") and read(
        state
    ).top_blocks.tolist() == [1, 0]


def test_bad_steps_are_kept_by_episode_with_their_tags():
    series = np.ones(90, np.float32)
    bad = {20: 10.0, 25: np.nan, 30: 7.0, 31: 6.0, 45: 8.0, 53: 30.0, 54: 20.0, 70: 100.0, 88: 9.0}
    series[list(bad)] = list(bad.values())
    series[3] = 50.0  # too early: the median is not known yet
    tags = jnp.arange(1000, 1090, dtype=jnp.int32)
    state, seen = run(oc.watch(bad_steps=3), series, tags=tags)
    found = oc.monitoring.bad_steps(state)
    assert [tuple(x.step for x in episode[:3]) for episode in found] == [
        (46, 54, 55),
        (71, 71, 71),
        (89, 89, 89),
    ]
    assert [x.tag for x in found[0][:3]] == [1045, 1053, 1054]
    assert [episode.bad_steps for episode in found] == [3, 1, 1]
    norms = [x.norm for x in (*found[0][:3], found[1].first)]
    np.testing.assert_allclose(norms, np.array([8, 30, 20, 100]) * norm_of(PARAMS), rtol=1e-5)
    np.testing.assert_allclose(found[1].worst.median_ratio, 100, rtol=0.35)
    assert int(read(state).bad.places[0, 2, 4]) == 4 and seen["watch/bad_steps"][-1] == 9
    first = oc.monitoring.bad_steps(run(oc.watch(), series)[0])[0]
    assert [x.step for x in first[:3]] == [21, 26, 32] and first.worst.block == "embed"
    assert str(first).startswith("steps 21 to 32, 4 bad; first: step 21 (tag 20): norm")
    assert str(first).endswith("; worst: step 26 (tag 25): not finite, first in embed")


def test_of_a_run_of_nan_the_first_step_and_what_broke_before_it_are_kept():
    """Layer 7 grows first, then its neighbours; from the NaN on there is nothing to see."""
    tx = oc.watch()
    starts = {"layers/7": 20, "layers/6": 21, "layers/8": 22}

    def step(state, t):
        grads = dict(PARAMS)
        for name, start in starts.items():
            grads[name] *= jnp.where(t >= start, 10.0 ** (2.0 * (t - start + 1)), 1.0)
        grads = {k: jnp.where(t >= 23, jnp.nan, g) for k, g in grads.items()}
        return tx.update(grads, state, tag=t.astype(int))[1], None

    state = jax.jit(lambda: jax.lax.scan(step, tx.init(PARAMS), jnp.arange(300.0)))()[0]
    (episode,) = oc.monitoring.bad_steps(state)
    assert (episode.first.step, episode.first.block, episode.first.tag) == (21, "layers/7", 20)
    assert (episode.worst.step, episode.last.step, episode.bad_steps) == (24, 300, 280)
    assert list(episode.norms) == list(range(17, 25)) and np.isnan(episode.norms[24]["embed"])
    assert episode.norms[22]["layers/6"] == pytest.approx(100 * norm_of(PARAMS["layers/6"]))
    assert list(episode.order().items())[:3] == [
        (name, start + 1) for name, start in starts.items()
    ]
    assert set(list(episode.order().values())[3:]) == {24}
    order = "broke first: layers/7 at step 21, layers/6 at step 22, layers/8 at step 23"
    assert order in oc.explain(state).splitlines()


def test_the_norms_of_a_long_burst_are_those_of_its_start():
    series = np.ones(60, np.float32)
    series[30:45] = 20.0
    (episode,) = oc.monitoring.bad_steps(run(oc.watch(), series)[0])
    assert list(episode.norms) == list(range(28, 36)) and set(episode.order().values()) == {31}
    (early,) = oc.monitoring.bad_steps(run(oc.watch(), np.array([np.nan], np.float32))[0])
    assert list(early.norms) == [1] and set(early.order().values()) == {1}


@pytest.mark.parametrize("steps", [32, 60])
def test_the_norms_before_an_episode_are_kept_however_soon_it_follows_another(steps):
    """Nine steps after the one before it: then the eight before it are those of its episode."""
    series = (1 + np.arange(60, dtype=np.float32) / 100)[:steps]
    series[[20, 29, 30]] = 20.0
    episode = oc.monitoring.bad_steps(run(oc.watch(), series)[0])[-1]
    end = min(steps, 34)
    assert episode.first.step == 30 and list(episode.norms) == list(range(end - 7, end + 1))
    got = [row["embed"] for row in episode.norms.values()]
    np.testing.assert_allclose(got, norm_of(PARAMS["embed"]) * series[end - 8 : end], rtol=1e-5)


def test_tags_are_one_integer_or_nothing():
    tx = oc.watch()
    state = tx.init(PARAMS)
    _, after = tx.update(scaled(jnp.nan), state)
    assert oc.monitoring.bad_steps(after)[0].first.tag is None
    for tag in (7, np.int64(7), jnp.uint8(7)):
        assert (
            oc.monitoring.bad_steps(tx.update(scaled(jnp.nan), state, tag=tag)[1])[0].first.tag == 7
        )
    for tag in (1.5, "a", jnp.arange(2)):
        with pytest.raises(ValueError, match="tag must be one integer"):
            tx.update(PARAMS, state, tag=tag)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": scopes.tree},
        {"scope": scopes.units()},
        {"scope": scopes.groups},
        {"scope": "leaf"},
        {"exclude": ["a"]},
        {"top": 0},
        {"bad_steps": 0},
        {"quantiles": (1.5,)},
        {"candidates": {"a": -1.0}},
        {"candidates": ["a"]},
        {"spike_factor": 0.5},
        {"quantiles": 0.5},
        {"candidates": 0.5},
        {"candidates": [-1.0]},
        {"candidates": {"a": oc.clip_by(1.0)}},
    ],
)
def test_wrong_arguments(wrong):
    ((argument, _),) = wrong.items()
    with pytest.raises(ValueError, match=f"watch: {argument} must be"):
        oc.watch(**wrong)


WRONG_STATES = {
    "None": (None, r"watch: update was called with the state None"),
    "of another transformation": (
        optax.adam(0.1).init(PARAMS),
        "watch: this is not a state of watch",
    ),
    "of a clip": (
        oc.clip_by_leaf_norm(1.0).init(PARAMS),
        "watch: this is not a state of watch but ClipState",
    ),
    "of other blocks": (
        oc.watch().init({"other": jnp.ones(1)}),
        r"watch: .*missing are \['other'\]",
    ),
    "of as many blocks of other names": (
        oc.watch().init({f"x/{name}": p for name, p in PARAMS.items()}),
        r"watch: .*new are \['embed', ",
    ),
    "of another watch": (
        oc.watch(candidates=[1.0]).init(PARAMS),
        "watch: this state was not made by tx.init",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_states(case):
    state, words = WRONG_STATES[case]
    with pytest.raises(ValueError, match=words):
        oc.watch().update(PARAMS, state)


NOTHING = {
    "empty": {},
    "None": None,
    "integers": {"a": jnp.arange(3)},
    "no elements": {"a": jnp.zeros(0)},
    "zeros": {"a": jnp.zeros(2)},
}


@pytest.mark.parametrize("tree", NOTHING.values(), ids=NOTHING)
def test_nothing_to_see(tree):
    tx = oc.watch()
    state = tx.init(tree)
    for _ in range(12):
        _, state = tx.update(tree, state)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(oc.metrics(state)))
    assert (
        float(read(state).total_norm) == 0
        and not oc.monitoring.bad_steps(state)
        and int(read(state).total_steps) == 12
    )
    assert isinstance(oc.explain(state, tree), str)


def test_one_trace_and_donation():
    tx, traces = optax.chain(oc.watch(), oc.clip_by_global_norm(1.0), optax.sgd(0.1)), []

    def step(state, factor, tag):
        traces.append(1)
        return tx.update(scaled(factor), state, PARAMS, tag=tag)[1]

    state = tx.init(PARAMS)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)
    step = jax.jit(step, donate_argnums=0)
    for i in range(3):
        old, state = state, step(state, jnp.float32(i), jnp.int32(i))
        assert old[0].packed["int32"].is_deleted()
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))


def test_no_gradient_is_kept_and_none_is_changed_by_the_candidates():
    """The state is small whatever the tree, and no output but the gradients is as large."""
    tx, grads = oc.watch(), {"w": jnp.ones((30, 30))}
    state = tx.init(grads)
    assert sum(x.size for x in jax.tree.leaves(state)) < 300
    jaxpr = jax.make_jaxpr(tx.update)(grads, state)
    assert jaxpr.jaxpr.outvars[0] is jaxpr.jaxpr.invars[0]


def test_one_read_with_a_clip_of_the_same_blocks():
    """XLA merges the two equal measurements; that of a global clip is another one."""

    def reads(*chain):
        tx = optax.chain(*chain)
        state = tx.init(PARAMS)
        compiled = jax.jit(lambda g, s: tx.update(g, s)).lower(PARAMS, state).compile(AS_USERS)
        return compiled.as_text().count(
            " conditional("
        )  # each measurement has one, for norms out of range

    assert reads(oc.watch()) == 1 == reads(oc.watch(), oc.clip_by_leaf_norm(1.0))
    assert reads(oc.watch(), oc.clip_by_global_norm(1.0)) == 2


def test_in_multi_steps_and_after_a_skip():
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(optax.chain(oc.watch(), optax.sgd(0.1)), 2)
        state = tx.init(PARAMS)
        for factor in (1.0, 3.0, 1.0, 1.0):
            _, state = tx.update(scaled(factor), state, PARAMS, tag=4)
        seen = oc.metrics(state)
        np.testing.assert_allclose(seen["watch/grad_norm"], norm_of(PARAMS), rtol=1e-6)
        assert seen["watch/steps"] == 2 and "2" in oc.explain(state)


def test_poison_leaves_every_statistic_sound():
    """Within 100 steps after any poison all statistics are near those of a run without."""
    steps = 800
    base = lengths(steps, 0.3)
    tx = oc.watch(candidates={"mean": thresholds.running(1.2), "z": thresholds.zscore(1.0)})
    series = jnp.stack(
        [
            jnp.asarray(base * s)
            for s in [np.ones(steps), *(factors(p, steps) for p in POISONS.values())]
        ]
    )

    def one(factors):
        def step(state, factor):
            _, state = tx.update(scaled(factor), state, PARAMS)
            return state, read(state).quantiles

        return jax.lax.scan(step, tx.init(PARAMS), factors)

    states, quantiles = jax.jit(jax.vmap(one))(series)
    numbers = read(states)
    chex.assert_tree_all_finite((numbers.trackers, quantiles, states.block_norms))
    for i, (name, poison) in enumerate(POISONS.items(), start=1):
        ratio = np.asarray(quantiles[i] / quantiles[0])[poison.last + 1 + 100 :] / poison.lasting
        assert len(ratio) > 100 and np.all((ratio > 1 / 2) & (ratio < 2)), name
        assert int(numbers.total_steps[i]) == steps


def test_sharded_and_in_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    grads = {"a": jnp.arange(16.0).reshape(8, 2), "b": jnp.arange(3.0)}
    layout = {"a": P("x"), "b": P()}

    def two(grads, axis_names=None):
        tx = oc.watch(candidates={"1": 1.0, "z": thresholds.zscore()}, axis_names=axis_names)
        state = tx.init(grads)

        def step(state, tag):
            out, state = tx.update(grads, state, tag=tag)
            return state, out

        state, _ = jax.lax.scan(step, state, jnp.arange(2, dtype=jnp.int32))
        return state

    want = jax.jit(two)(grads)
    placed = jax.device_put(grads, jax.tree.map(lambda s: NamedSharding(mesh, s), layout))
    chex.assert_trees_all_close(jax.jit(two)(placed), want, rtol=1e-6)
    out = jax.tree.map(lambda _: P(), want)
    inside = jax.shard_map(two, mesh=mesh, in_specs=(layout,), out_specs=out)
    chex.assert_trees_all_close(jax.jit(inside)(grads), want, rtol=1e-6)
    names = {"a": "x", "b": ()}
    untyped = jax.shard_map(
        lambda g: two(g, names), mesh=mesh, in_specs=(layout,), out_specs=out, check_vma=False
    )
    chex.assert_trees_all_close(jax.jit(untyped)(grads), want, rtol=1e-6)
    with pytest.raises(ValueError, match="axis_names="):
        jax.jit(jax.shard_map(two, mesh=mesh, in_specs=(layout,), out_specs=out, check_vma=False))(
            grads
        )


@pytest.mark.filterwarnings("ignore")  # Orbax's own warnings
def test_kept_on_disk(tmp_path):
    tx = oc.watch()
    state, _ = run(tx, lengths(20))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        by_orbax = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: tx.init(PARAMS)))
    for restored in (pickle.loads(pickle.dumps(state)), by_orbax):
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
        chex.assert_trees_all_equal(run(tx, lengths(5), restored)[0], run(tx, lengths(5), state)[0])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_read_out_of_any_nesting():
    with jax.numpy_dtype_promotion("standard"):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        tx = optax.chain(oc.watch(), oc.clip_by_leaf_norm(0.5), optax.adam(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3)))))(model))
        seen = oc.metrics(optimizer.opt_state)
        np.testing.assert_allclose(seen["watch/grad_norm/bias"], 8**0.5, rtol=1e-6)
        assert all(isinstance(x, jax.Array) and x.shape == () for x in seen.values())
        assert "kernel" in oc.explain(optimizer.opt_state, nnx.state(model))
    two = optax.chain(
        oc.watch(), oc.clip(1.0), oc.watch(candidates={}, quantiles=(), exclude="embed")
    )
    seen = oc.metrics(two.init(PARAMS), watch_prefix="w/")
    assert seen["w/0/steps"] == seen["w/1/steps"] == 0 and "w/1/grad_norm/embed" not in seen
    assert not [
        key for key in seen if key.startswith("w/1/would") or key.startswith("w/1/quantile")
    ]
    assert not oc.check(
        optax.chain(oc.watch(), oc.clip_by_global_norm(1.0), optax.adam(0.1)), PARAMS
    )


def test_shapes_are_enough_to_initialise():
    tx = oc.watch()
    shapes = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, PARAMS), tx.init(PARAMS))


def test_unfiltered_equinox_models_pass():
    """Functions and strings are leaves there."""
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    grads = (model, "a string", jnp.tanh)
    tx = oc.watch()
    out, state = tx.update(grads, tx.init(grads))
    assert jax.tree.leaves(out) == jax.tree.leaves(grads)
    np.testing.assert_allclose(
        read(state).total_norm, norm_of(eqx.filter(model, eqx.is_array)), rtol=1e-6
    )


def test_parameters_without_a_gradient_do_not_count():
    """`None` among the updates: the norm of the parameters is that of the others."""
    tx = oc.watch(candidates={"share": thresholds.param_relative(1.0)})
    params = {"frozen": jnp.full(2, 100.0), "w": jnp.full(2, 1.0)}
    grads = {"frozen": None, "w": jnp.full(2, 2.0)}
    _, state = tx.update(grads, tx.init(grads), params)
    assert read(state).would_clip.tolist() == [1]
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(grads, tx.init(grads))


def test_built_inside_jit_it_keeps_no_tracer():
    built = []

    def step(limit):
        built.append(oc.watch())
        tx = oc.watch(candidates={"1": limit}, spike_factor=limit)
        return read(tx.update(PARAMS, tx.init(PARAMS))[1]).would_clip

    with jax.checking_leaks():
        assert jax.jit(step)(2.0).tolist() == [1]
    built[0].update(PARAMS, built[0].init(PARAMS))


def test_the_names_of_the_fields_are_frozen():
    """Checkpoints are restored by these names."""
    state = oc.watch().init(PARAMS)
    assert state._fields == (
        "packed", "block_norms", "histogram", "blocks", "ranks", "episodes", "quantiles",
        "candidates",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_elements_of_each_block_are_counted_by_powers_of_ten(dtype):
    rng = np.random.default_rng(0)
    values = {
        n: rng.choice([-1, 1], 500) * 10.0 ** rng.uniform(-11, 8, 500) for n in ("a", "b/0", "b/1")
    }
    grads = {n: jnp.asarray(x, dtype).reshape(20, 25) for n, x in values.items()}
    grads["a"] = grads["a"].at[0, :4].set(jnp.asarray([0, jnp.nan, jnp.inf, -jnp.inf], dtype))
    tx = oc.watch(scope=scopes.groups(lambda path: path[0]), histogram=True)
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    found = oc.loggers.histograms((oc.watch().init(grads), state))
    for group, counts in found.counts.items():
        size = np.abs(
            np.concatenate([np.float32(g).ravel() for n, g in grads.items() if n[0] == group])
        )
        size = np.minimum(size[~np.isnan(size)], 1e30)
        edges = np.append(found.edges[:-1].astype(np.float32), np.float32(1e38))
        np.testing.assert_array_equal(counts, np.histogram(size, edges)[0])
    assert found.counts.keys() == {"a", "b"} and found.counts["a"].sum() == 499
    assert oc.loggers.histograms(oc.watch().init(grads)).counts == {}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    layout = {"a": P("x"), "b/0": P(), "b/1": P(None)}
    count = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[1].histogram,
        mesh=mesh,
        in_specs=(layout,),
        out_specs=P(),
    )
    np.testing.assert_array_equal(jax.jit(count)(grads), state.histogram)
