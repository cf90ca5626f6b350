"""A run that is stopped and resumed equals the uninterrupted run, for every way to save a state on
disk.
"""

import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import optaxclip
from optaxclip.clips.acclip import ACClipState
from optaxclip.clips.momentum_norm import MomentumNormState
from optaxclip.clips.second_moment import SecondMomentState
from optaxclip.clips.u_clip import CarryState
from optaxclip.thresholds.combine import LagState, UntilState
from optaxclip.thresholds.fixed import ScheduleState
from optaxclip.thresholds.learned import BlockState, LearnedState
from optaxclip.thresholds.window import MedianState, SortedRing
from optaxclip.wrappers.reset_moments import ResetState
from optaxclip.wrappers.stable_adamw import StableRmsState
from optaxclip.wrappers.steps import SkipState

PARAMS = {
    "enc": {"kernel": jnp.ones((3, 2), jnp.bfloat16)},
    "head": [jnp.ones(2), jnp.full(1, 2.0)],
}
GRADS = jax.tree.map(lambda p: p * jnp.asarray(3, p.dtype), PARAMS)
HISTORY = optaxclip.thresholds.until(
    2, 5.0, optaxclip.thresholds.lag(optax.chain(optax.ema(0.5), optax.scale(0.9)))
)


pytestmark = pytest.mark.usefixtures("mixed_dtypes")  # Optax promotes dtypes


def optimizer():
    return optax.chain(optaxclip.clip_by(HISTORY, scope=optaxclip.scopes.leaf), optax.adamw(0.1))


def steps(params, state, factors):
    @jax.jit
    def step(params, state, factor):
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), GRADS)
        updates, state = optimizer().update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for factor in factors:
        params, state = step(params, state, jnp.float32(factor))
    return params, state


def by_pickle(state, path):
    return pickle.loads(pickle.dumps(state))


def by_flax(state, path):
    return flax.serialization.from_bytes(
        optimizer().init(PARAMS), flax.serialization.to_bytes(state)
    )


def by_flax_dict(state, path):
    return flax.serialization.from_state_dict(
        optimizer().init(PARAMS), flax.serialization.to_state_dict(state)
    )


def by_orbax(state, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(
            path / "state", jax.eval_shape(lambda: optimizer().init(PARAMS))
        )


@pytest.mark.filterwarnings("ignore")  # Orbax's own warnings
@pytest.mark.parametrize("keep", [by_pickle, by_flax, by_flax_dict, by_orbax])
def test_a_run_resumes_where_it_stopped(keep, tmp_path):
    params, state = steps(PARAMS, optimizer().init(PARAMS), [1.0, 2.0, 0.5])
    restored = keep(state, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)
    assert (
        type(restored[0]) is optaxclip.base.ClipState
        and type(restored[0].metrics) is optaxclip.base.Metrics
    )
    chex.assert_trees_all_equal(
        steps(params, restored, [4.0, 1.0]), steps(params, state, [4.0, 1.0])
    )
    assert optaxclip.metrics(restored).keys() == optaxclip.metrics(state).keys()


@pytest.mark.filterwarnings("ignore")
def test_an_nnx_model_and_its_optimizer_through_orbax(tmp_path):
    def build():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    model, opt = build()
    for _ in range(3):
        opt.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2))(model))
    both = nnx.state((model, opt))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", both)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "nnx", nnx.state(nnx.eval_shape(build)))
    fresh = build()
    nnx.update(fresh, restored)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(fresh)), nnx.to_pure_dict(both))
    assert jax.tree.map(float, optaxclip.metrics(fresh[1].opt_state)) == jax.tree.map(
        float, optaxclip.metrics(opt.opt_state)
    )


@pytest.mark.filterwarnings("ignore")
def test_a_clip_can_be_added_to_a_checkpoint_without_one(tmp_path):
    """Restore the old state and put a fresh clip in front of it."""
    old = optax.chain(optax.adamw(0.1))
    _, state = old.update(GRADS, old.init(PARAMS), PARAMS)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "old", jax.eval_shape(lambda: old.init(PARAMS)))
    fresh = optimizer().init(PARAMS)
    _, after = steps(PARAMS, (fresh[0], *restored), [1.0])
    assert (
        int(optax.tree.get(after[1], "count")) == 2
        and int(optaxclip.metrics(after)["clip/steps"]) == 1
    )


def test_the_record_is_arrays_and_dicts_only():
    """No node type that a serializer would have to know, and nothing but arrays of fixed
    shape.
    """
    state = optimizer().init(PARAMS)[0]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    blocks = {
        "0": {"enc": {"kernel": None}},
        "1": {"head": {"0": None}},
        "2": {"head": {"1": None}},
    }
    assert state.metrics.blocks == blocks
    shapes = {jnp.shape(x) for x in jax.tree.leaves(state)}
    assert shapes == {(), (3,)}


FIELDS = {
    optaxclip.base.ClipState: "threshold metrics",
    optaxclip.base.Metrics: "grad_norm clip_bound clip_factor clipped_share clipped_steps"
    " nonfinite_steps total_steps blocks",
    LagState: "inner clip_bound",
    UntilState: "clip_step inner",
    ScheduleState: "clip_step",
    LearnedState: "blocks warmup",
    BlockState: "value seen over",
    SortedRing: "ring ordered",
    MedianState: "window clip_bound",
    CarryState: "carry clip",
    MomentumNormState: "clip_step momentum clip",
    SecondMomentState: "clip_step rms clip",
    ACClipState: "momentum size",
    StableRmsState: "inner clip",
    ResetState: "reset_step inner",
    optaxclip.per_example.FeedbackState: "error",
    optaxclip.per_example.QuantileState: "bound key",
    SkipState: "skipped_steps consecutive_skips last_reason spike loss inner",
}


@pytest.mark.parametrize("state", FIELDS, ids=lambda state: state.__name__)
def test_the_names_of_the_fields_are_frozen(state):
    """Checkpoints are restored by these names: a change here breaks users' checkpoints."""
    assert state._fields == tuple(FIELDS[state].split())


def test_field_names_do_not_shadow_those_of_adam():
    """(A threshold made of `optax.ema` does bring a second `count`: that is Optax's own.)"""
    threshold = optaxclip.thresholds.until(2, 5.0, optaxclip.thresholds.lag(optax.scale(2.0)))
    state = optax.chain(optaxclip.clip_by(threshold), optax.adamw(0.1)).init(PARAMS)
    assert optax.tree.get(state, "count") == 0 and optax.tree.get(state, "clip_step") == 0
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), state[1][0].mu)
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), state[1][0].nu)
    np.testing.assert_array_equal(optax.tree.get(state, "clip_factor"), 1.0)
