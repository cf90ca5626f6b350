"""What happened is in the state, and the state goes wherever an optimizer's state goes."""

import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import optaxclip
from optaxclip.thresholds.combine import LagState
from optaxclip.thresholds.fixed import ScheduleState


@pytest.fixture(autouse=True)
def promotion():
    """Optax's Adam and its wrappers promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
ONES = jax.tree.map(jnp.ones_like, GRADS)
CLIP = optaxclip.clip_by_leaf_norm(1.0)

NESTINGS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.adamw(0.1)),
    "named_chain": lambda tx: optax.named_chain(("clip", tx), ("adam", optax.adam(0.1))),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": True}),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"a": "x", "b": "x"}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_metrics_are_found_in_any_nesting(nest):
    tx = nest(CLIP)
    state = tx.init(ONES)
    for _ in range(3):
        _, state = jax.jit(tx.update)(GRADS, state, ONES)
    seen = jax.jit(optaxclip.metrics)(state)
    assert all(jnp.ndim(x) == 0 for x in seen.values())
    assert {name: round(float(x), 3) for name, x in seen.items()} == {
        "clip/steps": 3,
        "clip/grad_norm": 5.0,
        "clip/grad_norm/a": 5.0,
        "clip/grad_norm/b": 1.0,
        "clip/bound": 1.0,
        "clip/bound/a": 1.0,
        "clip/bound/b": 1.0,
        "clip/factor": 0.2,
        "clip/factor/a": 0.2,
        "clip/factor/b": 1.0,
        "clip/clipped": 0.5,
        "clip/clipped/a": 1.0,
        "clip/clipped/b": 0.0,
        "clip/clipped_fraction": 0.5,
        "clip/clipped_fraction/a": 1.0,
        "clip/clipped_fraction/b": 0.0,
        "clip/nonfinite_steps": 0.0,
        "clip/nonfinite_steps/a": 0.0,
        "clip/nonfinite_steps/b": 0.0,
    }


def test_two_clips_in_a_chain_are_both_found():
    tx = optax.chain(optaxclip.clip_by_global_norm(2.0), optax.scale(3.0), optaxclip.clip(1.0))
    _, state = tx.update(GRADS, tx.init(ONES))
    seen = optaxclip.metrics(state, prefix="")
    np.testing.assert_allclose([seen["0/grad_norm"], seen["1/bound"]], [26**0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(seen["1/clipped"], 3 / 3)
    assert optaxclip.metrics(optax.adam(0.1).init(ONES)) == {}


def test_units_report_extremes_and_shares():
    grads = {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.0]]), "bias": jnp.array([0.5, 0.0])}
    tx = optaxclip.clip_by(1.0, scope=optaxclip.units())
    _, state = tx.update(grads, tx.init(grads))
    seen = optaxclip.metrics(state)
    np.testing.assert_allclose([seen["clip/grad_norm"], seen["clip/factor"], seen["clip/clipped"]], [5, 0.2, 1 / 3])


def test_optax_finds_the_norm_by_name():
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(0.1))
    _, state = tx.update(GRADS, tx.init(ONES), ONES)
    np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), 26**0.5, rtol=1e-6)
    assert optax.tree.get(state, "count") == 1


ADAPTIVE = optax.chain(
    optaxclip.clip_by(optaxclip.until(2, optaxclip.lag(optax.scale(2.0)), 5.0), scope=optaxclip.leaf), optax.adamw(0.1)
)


def trained_state():
    state = ADAPTIVE.init(ONES)
    for _ in range(2):
        _, state = ADAPTIVE.update(GRADS, state, ONES)
    return state


def test_pickle_and_flax_round_trips():
    state = trained_state()
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)
    fresh = ADAPTIVE.init(ONES)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state)), state)


@pytest.mark.filterwarnings("ignore")  # what Orbax warns of is not ours
def test_orbax_round_trip(tmp_path):
    state = trained_state()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: ADAPTIVE.init(ONES)))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    assert type(restored[0]) is optaxclip.ClipState


def test_map_params_passes_over_our_state():
    state = trained_state()
    doubled = optax.tree.map_params(ADAPTIVE, lambda x: x * 2, state)
    chex.assert_trees_all_equal(doubled[0], state[0])


def test_the_names_of_the_fields_are_frozen():
    """Checkpoints are restored by these names: a change here breaks users' checkpoints."""
    assert optaxclip.ClipState._fields == ("threshold", "metrics")
    assert optaxclip.Metrics._fields == (
        "grad_norm",
        "clip_bound",
        "clip_factor",
        "clipped_share",
        "clipped_steps",
        "nonfinite_steps",
        "total_steps",
        "blocks",
    )
    assert LagState._fields == ("inner", "clip_bound")
    assert ScheduleState._fields == ("clip_step", "inner")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("clip", [optaxclip.clip_by_global_norm, optaxclip.clip_by_leaf_norm])
def test_injected_schedules_work_in_every_dtype(clip, dtype):
    tx = optax.inject_hyperparams(clip)(max_norm=lambda step: 2.0 / (step + 1))
    grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    state = tx.init(grads)
    for bound in (2.0, 1.0):
        updates, state = jax.jit(tx.update)(grads, state)
        assert updates["a"].dtype == dtype
        np.testing.assert_allclose(optaxclip.metrics(state)["clip/bound"], bound, rtol=1e-2)


def test_multi_steps_clips_the_mean_of_the_micro_batches():
    tx = optax.MultiSteps(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0)), 2)
    state = tx.init(ONES)
    for scale in (1.0, 3.0):
        updates, state = jax.jit(tx.update)(optax.tree.scale(scale, GRADS), state, ONES)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -g / 26**0.5, GRADS), rtol=1e-6)
    assert optaxclip.metrics(state)["clip/steps"] == 1


def test_apply_if_finite_outside_guards_and_the_clip_state_is_held():
    tx = optax.apply_if_finite(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0)), 5)
    _, state = tx.update(GRADS, tx.init(ONES), ONES)
    updates, state = jax.jit(tx.update)(jax.tree.map(lambda g: g * jnp.nan, GRADS), state, ONES)
    assert not np.any(updates["a"]) and optaxclip.metrics(state)["clip/steps"] == 1


def test_partition_gives_each_group_its_own_norm():
    both = {"x": optaxclip.clip_by_global_norm(1.0), "y": optaxclip.clip_by_global_norm(1.0)}
    tx = optax.partition(both, {"a": "x", "b": "y"})
    updates, state = tx.update(GRADS, tx.init(ONES), ONES)
    np.testing.assert_allclose(optax.tree.norm(updates), 2**0.5, rtol=1e-6)
    assert len(optaxclip.metrics(state)) == 14
