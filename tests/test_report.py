"""Reports from inside the compiled step: the right steps and numbers, in each context of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc

GRADS = {"a": jnp.ones(8), "b": jnp.ones(8)}
NORM = 4.0
STEPS = 6


def reporting(every=3, callback=None, **options):
    """An optimizer, and the list of what it reports."""
    seen = []
    chain = optax.chain(oc.watch(**options), oc.clip_by_global_norm(1.0, **options))
    chain = optax.chain(chain, optax.sgd(0.1))
    callback = (lambda *both: seen.append(both)) if callback is None else callback
    return oc.report(chain, callback, every=every), seen


def train(tx, factor=1.0, grads=None):
    """A training loop that returns no state; the norm at step t is 4 · t · `factor`."""
    grads = GRADS if grads is None else grads

    def step(state, t):
        now = jax.tree.map(lambda g: g * (t * factor), grads)
        updates, state = tx.update(now, state, grads, loss=t / 2)
        return state, updates

    return lax.scan(step, tx.init(grads), jnp.arange(1.0, STEPS + 1))[1]


def norms(seen):
    """The steps and norms that were reported."""
    jax.effects_barrier()
    return [(step, round(row["clip/grad_norm"], 4)) for step, row in seen]


ONE = [(1, NORM), (3, 3 * NORM), (6, 6 * NORM)]


def test_in_a_scan_under_jit():
    tx, seen = reporting()
    updates = jax.jit(lambda: train(tx))()
    assert norms(seen) == ONE
    row = seen[1][1]
    assert row["loss"] == 1.5 and row["clip/steps"] == 3 and type(row["clip/steps"]) is int
    assert row.keys() - {"loss"} == set(oc.metrics(tx.init(GRADS)))
    plain = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))
    np.testing.assert_array_equal(updates["a"], jax.jit(lambda: train(plain))()["a"])


def test_one_step_at_a_time_without_jit():
    tx, seen = reporting(every=2)
    state = tx.init(GRADS)
    for _ in range(4):
        _, state = tx.update(GRADS, state)
    assert [step for step, _ in norms(seen)] == [1, 2, 4] and "loss" not in seen[0][1]


def test_vmapped_runs_report_each_for_itself():
    tx, seen = reporting()
    factors = jnp.arange(1.0, 7).reshape(2, 3)
    jax.jit(jax.vmap(jax.vmap(lambda factor: train(tx, factor))))(factors)
    jax.effects_barrier()
    found = {(step, row["run"]): row["clip/grad_norm"] for step, row in seen}
    want = {(s, run): s * (run + 1) * NORM for s in (1, 3, 6) for run in range(6)}
    assert found == pytest.approx(want) and len(seen) == 18


def test_only_runs_that_are_due_report():
    tx, seen = reporting()
    state = tx.init(GRADS)
    many = jax.vmap(lambda n: state._replace(total_steps=n))(jnp.arange(4, dtype=jnp.int32))
    update = jax.jit(jax.vmap(lambda s: tx.update(GRADS, s)[1]))
    update(update(many))
    jax.effects_barrier()
    # Sorted, because the callbacks of one program are not ordered.
    assert sorted((step, row["run"]) for step, row in seen) == [(1, 0), (3, 1), (3, 2)]


def test_between_reports_the_host_is_not_called(monkeypatch):
    """Not even for a step that is not due, and not under `vmap` either."""
    calls, callback = [], jax.debug.callback

    def counting(f, *args):
        callback(lambda *xs: (calls.append(1), f(*xs)), *args)

    monkeypatch.setattr(jax.debug, "callback", counting)
    tx, seen = reporting()
    jax.jit(jax.vmap(lambda factor: train(tx, factor)))(jnp.arange(2.0))
    jax.effects_barrier()
    assert len(calls) == len(seen) == 6


MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
LAYOUT = {"a": P("x"), "b": P()}


def test_under_jit_on_sharded_arrays():
    placed = jax.device_put(GRADS, jax.tree.map(lambda s: NamedSharding(MESH, s), LAYOUT))
    tx, seen = reporting()
    jax.jit(lambda g: train(tx, grads=g))(placed)
    assert norms(seen) == ONE


@pytest.mark.parametrize("typed", [True, False], ids=["types", "no types"])
def test_in_shard_map_the_first_device_reports(typed):
    tx, seen = reporting(**({} if typed else {"axis_names": {"a": "x", "b": ()}}))
    out = {"a": P(None, "x"), "b": P()}
    step = jax.shard_map(
        lambda g: train(tx, grads=g), mesh=MESH, in_specs=(LAYOUT,), out_specs=out, check_vma=typed
    )
    jax.jit(step)(GRADS)
    assert norms(seen) == ONE


@pytest.mark.parametrize("axis", ["x", None])
def test_in_pmap_the_first_device_reports(axis):
    tx, seen = reporting(axis_names=())
    grads = jax.tree.map(lambda g: jnp.stack([g] * 4), GRADS)
    jax.pmap(lambda g: train(tx, grads=g), axis_name=axis)(grads)
    assert norms(seen) == ONE


def test_around_multi_steps_and_in_a_wrapper():
    with jax.numpy_dtype_promotion("standard"):
        seen = []
        inside = optax.MultiSteps(oc.watch(), 2)
        tx = oc.report(inside, lambda *both: seen.append(both), every=2)
        jax.jit(lambda: train(tx))()
    jax.effects_barrier()
    assert [(step, row["watch/steps"]) for step, row in seen] == [(1, 0), (2, 1), (4, 2), (6, 3)]
    tx, seen = reporting()
    jax.jit(lambda: train(oc.skip_nonfinite(tx)))()
    assert norms(seen) == ONE


def test_into_a_history_and_by_print(capsys):
    history = oc.History()
    tx, _ = reporting(callback=history)
    jax.jit(lambda: train(tx))()
    jax.effects_barrier()
    assert history.arrays()["step"].tolist() == [1, 3, 6]
    assert history.arrays()["watch/grad_norm/a"] == pytest.approx([8**0.5 * t for t in (1, 3, 6)])
    for callback in (None, print):
        tx = oc.report(oc.clip_by_global_norm(8.0), callback, every=6)
        jax.jit(lambda tx=tx: train(tx))()
        jax.effects_barrier()
        assert capsys.readouterr().out.splitlines() == [
            "step 1: loss 0.5, norm 4.0, bound 8.0, clipped 0 %",
            "step 6: loss 3.0, norm 24, bound 8.0, clipped 67 %",
        ]


def test_histograms_are_reported_but_not_to_a_history():
    seen, history = [], oc.History()
    watch = oc.watch(histogram=True)
    for callback in (lambda *both: seen.append(both), history):
        tx = oc.report(watch, callback, every=3)
        jax.jit(jax.vmap(lambda factor, tx=tx: train(tx, factor)))(jnp.array([0.1, 10.0]))
        jax.effects_barrier()
    for step, row in seen:
        size = step * (10.0 if row["run"] else 0.1)
        at = np.searchsorted(oc.loggers.histograms(watch.init(GRADS)).edges, size, "right") - 1
        assert row["histogram/a"].tolist() == [8 * (i == at) for i in range(15)]
    assert len(seen) == len(history) == 6


def test_wrong_arguments():
    for wrong, words in (
        ({"every": 0}, "report: every must be"),
        ({"callback": "file"}, "report: callback must be a function of"),
        ({"inner": 1.0}, "report: inner must be an optimizer"),
    ):
        with pytest.raises(ValueError, match=words):
            oc.report(**{"inner": oc.clip_by_global_norm(1.0), **wrong})
    with pytest.raises(ValueError, match=r"no clip, watch or skip .*chain\(optaxclip.watch\(\)"):
        oc.report(optax.adam(0.1)).init(GRADS)
    with pytest.raises(ValueError, match="report: update was called with the state None"):
        oc.report(oc.watch()).update(GRADS, None)
