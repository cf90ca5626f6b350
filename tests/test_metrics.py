"""`metrics` reads the right values, under the names of their owners, from any nesting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optaxclip
from optaxclip import scopes, thresholds

KEYS = ["bound", "clipped", "clipped_fraction", "factor", "grad_norm", "nonfinite_steps", "steps"]
GRADS = {
    "enc": {"b": jnp.array([3.0]), "w": jnp.array([0.0, 4.0])},
    "head": {"w": jnp.array([12.0])},
}
PARAMS = jax.tree.map(jnp.ones_like, GRADS)


pytestmark = pytest.mark.usefixtures("mixed_dtypes")  # Optax promotes dtypes


def after(tx, *factors, grads=GRADS):
    """The metrics after steps with these multiples of the gradients."""

    @jax.jit
    def step(state, factor):
        _, state = tx.update(jax.tree.map(lambda g: g * factor, grads), state, PARAMS)
        return state, optaxclip.metrics(state)

    state = tx.init(jax.tree.map(jnp.ones_like, grads))
    for factor in factors:
        state, seen = step(state, factor)
    return {name: float(x) for name, x in seen.items()}


def matches(seen, **want):
    """Whether `clip/<name>` is as said, for each name."""
    np.testing.assert_allclose(
        [seen[f"clip/{name}"] for name in want], list(want.values()), rtol=1e-6
    )


def test_one_norm_over_the_run():
    tx = optaxclip.clip_by_global_norm(6.5)
    assert sorted(after(tx, 1.0)) == [f"clip/{key}" for key in KEYS]
    fresh = optaxclip.metrics(tx.init(PARAMS))
    matches(
        fresh,
        grad_norm=0,
        bound=0,
        factor=1,
        clipped=0,
        clipped_fraction=0,
        nonfinite_steps=0,
        steps=0,
    )
    matches(
        after(tx, 1.0), grad_norm=13, bound=6.5, factor=0.5, clipped=1, clipped_fraction=1, steps=1
    )
    matches(after(tx, 1.0, 0.1), grad_norm=1.3, factor=1, clipped=0, clipped_fraction=0.5, steps=2)
    matches(
        after(tx, 0.1, 0.5, 2.0, 0.5),
        grad_norm=6.5,
        factor=1,
        clipped=0,
        clipped_fraction=0.25,
        steps=4,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_steps_that_are_not_finite_are_counted_apart(bad):
    """They show in the norm of the step, and count as nonfinite but not as clipped."""
    tx = optaxclip.clip_by_global_norm(6.5, nonfinite="zero")
    seen = after(tx, 1.0, bad)
    matches(seen, nonfinite_steps=1, clipped_fraction=0.5, steps=2, factor=0)
    assert not np.isfinite(seen["clip/grad_norm"])
    matches(
        after(tx, 1.0, bad, bad, 1.0),
        nonfinite_steps=2,
        clipped_fraction=0.5,
        steps=4,
        grad_norm=13,
        factor=0.5,
    )


def test_each_leaf_under_its_path():
    seen = after(optaxclip.clip_by_leaf_norm(4.0), 1.0, 0.5)
    blocks = ["enc/b", "enc/w", "head/w"]
    want = {
        "grad_norm": [1.5, 2, 6],
        "bound": [4, 4, 4],
        "factor": [1, 1, 2 / 3],
        "clipped": [0, 0, 1],
    }
    want |= {"clipped_fraction": [0, 0, 1], "nonfinite_steps": [0, 0, 0]}
    for key, values in want.items():
        matches(
            seen, **{f"{key}/{block}": value for block, value in zip(blocks, values, strict=True)}
        )
    matches(
        seen, grad_norm=6, bound=4, factor=2 / 3, clipped=1 / 3, clipped_fraction=1 / 3, steps=2
    )
    assert len(seen) == len(KEYS) + 6 * len(blocks)


def test_one_bad_leaf_is_named():
    seen = after(
        optaxclip.clip_by_leaf_norm(4.0), 1.0, grads=GRADS | {"head": {"w": jnp.array([jnp.nan])}}
    )
    matches(seen, **{"nonfinite_steps/head/w": 1, "nonfinite_steps/enc/w": 0, "nonfinite_steps": 1})


def test_each_group_under_its_name():
    seen = after(
        optaxclip.clip_by_group_norm(
            {"body": 2.5, "top": 24.0}, {"^enc/": "body", "^head/": "top"}
        ),
        1.0,
    )
    matches(seen, **{"grad_norm/body": 5, "bound/body": 2.5, "factor/body": 0.5, "clipped/body": 1})
    matches(seen, **{"grad_norm/top": 12, "bound/top": 24, "factor/top": 1, "clipped/top": 0})
    assert {name.split("/")[2] for name in seen if name.count("/") == 2} == {"body", "top"}
    by_module = after(optaxclip.clip_by_group_norm(5.0), 1.0)
    assert {name.split("/")[2] for name in by_module if name.count("/") == 2} == {"enc", "head"}


def test_units_and_elements_report_shares_and_extremes():
    kernel = jnp.array([[3.0, 0.3], [4.0, 0.4]])
    seen = after(optaxclip.clip_by(1.0, scope=scopes.units()), 1.0, 0.1, grads={"kernel": kernel})
    matches(
        seen, grad_norm=0.5, bound=1, factor=1, clipped=0, clipped_fraction=0.25, steps=2
    )  # one of two units, at one of two steps
    seen = after(optaxclip.clip_by(1.0, scope=scopes.units()), 1.0, grads={"kernel": kernel})
    matches(seen, grad_norm=5, factor=0.2, clipped=0.5)
    for tx in (optaxclip.clip(2.0, measure=True), optaxclip.clip_by_value(-1.0, 2.0, measure=True)):
        seen = after(tx, 1.0, grads={"kernel": kernel})
        matches(seen, grad_norm=4, bound=2, factor=0.5, clipped=0.5, clipped_fraction=1, steps=1)
        assert sorted(seen) == [f"clip/{key}" for key in KEYS]
    assert optaxclip.metrics(optaxclip.clip_by_value(-3.5, 2.0).init(PARAMS))["clip/steps"] == 0


def test_a_clip_that_does_not_measure_leaves_keys_out():
    assert after(optaxclip.clip(2.0), 1.0, 2.0) == {"clip/bound": 2, "clip/steps": 2}
    seen = after(optaxclip.clip_by_value(-1.0, 2.0), 1.0, 2.0)
    assert seen["clip/steps"] == 2 and seen.keys() <= {"clip/bound", "clip/steps"}
    both = after(optax.chain(optaxclip.clip(2.0), optaxclip.clip_by_leaf_norm(4.0)), 1.0)
    matches(both, **{"0/bound": 2, "0/steps": 1, "1/grad_norm": 2, "1/grad_norm/enc/b": 2})
    assert "clip/0/grad_norm" not in both


def test_an_adaptive_bound_is_that_of_the_step():
    tx = optaxclip.clip_by(thresholds.lag(optax.scale(2.0)))
    matches(after(tx, 1.0), bound=np.inf, clipped=0)
    matches(after(tx, 1.0, 4.0), bound=26, grad_norm=52, clipped=1, factor=0.5)
    matches(after(tx, 1.0, 4.0, 4.0), bound=104, clipped=0, clipped_fraction=1 / 3)


NESTINGS = {
    "chain in chain": lambda tx: optax.chain(optax.chain(optax.identity(), tx), optax.adam(0.1)),
    "named_chain": lambda tx: optax.named_chain(("clip", tx), ("adam", optax.adam(0.1))),
    "masked": lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, PARAMS)),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": optax.adam(0.1)}, jax.tree.map(lambda _: "x", PARAMS)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.adam(0.1)), 3),
    "schedule_free": lambda tx: optax.contrib.schedule_free(optax.chain(tx, optax.sgd(0.1)), 0.1),
    "injected": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(
        0.1
    ),
    "everything": lambda tx: optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(optax.masked(tx, lambda tree: jax.tree.map(lambda _: True, tree))), 3
        ),
        1,
    ),
}


@functools.cache
def after_alone(clip):
    return after(clip(4.0), 1.0, 0.1, 2.0)


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
@pytest.mark.parametrize("clip", [optaxclip.clip_by_global_norm, optaxclip.clip_by_leaf_norm])
def test_a_nesting_changes_nothing(clip, nest):
    assert after(nest(clip(4.0)), 1.0, 0.1, 2.0) == after_alone(clip)


def test_several_clips_are_numbered_in_the_order_of_the_state():
    tx = optax.chain(
        optaxclip.clip_by_global_norm(6.5), optax.scale(2.0), optaxclip.clip_by_leaf_norm(1.0)
    )
    seen = after(tx, 1.0)
    matches(
        seen,
        **{
            "0/grad_norm": 13,
            "0/bound": 6.5,
            "1/grad_norm": 12,
            "1/grad_norm/head/w": 12,
            "1/bound": 1,
        },
    )
    assert {name.split("/")[1] for name in seen} == {"0", "1"}


def test_parts_of_a_partition_name_only_their_own_leaves():
    parts = {"x": optaxclip.clip_by_leaf_norm(1.0), "y": optaxclip.clip_by_leaf_norm(2.0)}
    seen = after(optax.partition(parts, {"enc": {"b": "x", "w": "x"}, "head": {"w": "y"}}), 1.0)
    matches(seen, **{"0/grad_norm/enc/b": 3, "0/bound": 1, "1/grad_norm/head/w": 12, "1/bound": 2})
    assert "clip/0/grad_norm/head/w" not in seen and "clip/1/grad_norm/enc/b" not in seen


def test_the_prefix_and_no_clip_at_all():
    state = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(0.1)).init(PARAMS)
    assert sorted(optaxclip.metrics(state, prefix="")) == KEYS
    assert sorted(optaxclip.metrics(state, prefix="train/")) == [f"train/{key}" for key in KEYS]
    assert optaxclip.metrics(optax.adam(0.1).init(PARAMS)) == {}


def test_all_are_scalar_arrays_for_any_logger():
    clips = (
        optaxclip.clip_by_leaf_norm(1.0),
        optaxclip.clip(1.0),
        optaxclip.adaptive_grad_clip(0.1),
    )
    for tx in (*clips, optaxclip.watch(), optaxclip.skip_spikes(optax.sgd(0.1))):
        for key, x in optaxclip.metrics(tx.init(PARAMS)).items():
            assert isinstance(x, jax.Array) and x.shape == () and isinstance(float(x), float), key


def test_stacked_by_scan():
    tx = optax.chain(optaxclip.clip_by_leaf_norm(4.0), optax.sgd(0.1))

    def step(state, factor):
        _, state = tx.update(jax.tree.map(lambda g: g * factor, GRADS), state)
        return state, optaxclip.metrics(state)

    _, seen = jax.lax.scan(step, tx.init(PARAMS), jnp.array([1.0, 0.1, 0.5]))
    np.testing.assert_allclose(seen["clip/grad_norm/head/w"], [12, 1.2, 6], rtol=1e-6)
    np.testing.assert_allclose(seen["clip/clipped_fraction/head/w"], [1, 1 / 2, 2 / 3], rtol=1e-6)


WRAPPERS = {
    "skip_spikes": lambda tx: optaxclip.skip_spikes(tx, 100.0),
    "skip_nonfinite": optaxclip.skip_nonfinite,
    "both": lambda tx: optaxclip.skip_nonfinite(optaxclip.skip_spikes(tx, 100.0)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_skip_wrapper_changes_no_key_and_no_value_of_a_clip(wrap):
    chain = optax.chain(optaxclip.watch(), optaxclip.clip_by_leaf_norm(4.0), optax.sgd(0.1))
    alone, wrapped = (after(tx, 1.0, 0.5, 0.25) for tx in (chain, wrap(chain)))
    assert {key: x for key, x in wrapped.items() if not key.startswith("skip/")} == alone


def test_a_skip_wrapper_reports_what_it_skipped_and_what_its_test_saw():
    tx = optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_global_norm(6.5), optax.sgd(0.1)), 20.0
    )
    steps = {"steps": 2, "fraction": 0.5, "consecutive": 2, "last_reason": 3}
    seen = after(tx, 1.0, 0.5, 2.0, np.nan)
    np.testing.assert_allclose([seen[f"skip/{key}"] for key in steps], list(steps.values()))
    assert np.isnan(seen["skip/grad_norm"]) and seen["skip/bound"] == 20
    matches(seen, grad_norm=6.5, steps=2)
    seen = after(tx, 1.0, 2.0, 1.0)
    steps = {
        "steps": 1,
        "fraction": 1 / 3,
        "consecutive": 0,
        "last_reason": 1,
        "grad_norm": 13,
        "bound": 20,
    }
    np.testing.assert_allclose(
        [seen[f"skip/{key}"] for key in steps], list(steps.values()), rtol=1e-6
    )
    assert sorted(key for key in seen if key.startswith("skip/")) == sorted(
        f"skip/{key}" for key in steps
    )
    two = optaxclip.metrics(optaxclip.skip_nonfinite(tx).init(PARAMS), skip_prefix="s/")
    assert two["s/0/bound"] == 0 == two["s/1/steps"] and "clip/steps" in two


BATCHED = {
    "global norm": optaxclip.clip_by_global_norm,
    "leaf norms": optaxclip.clip_by_leaf_norm,
    "units": lambda value: optaxclip.clip_by(value, scope=scopes.units()),
    "elements": lambda value: optaxclip.clip(value, measure=True),
    "elements, not measured": optaxclip.clip,
    "watch": lambda value: optaxclip.watch(candidates={"value": value}),
    "skip": lambda value: optaxclip.skip_spikes(optaxclip.clip_by_leaf_norm(value), value),
}


@pytest.mark.parametrize("make", BATCHED.values(), ids=BATCHED)
def test_metrics_of_vmapped_runs_are_those_of_each_run(make):
    values = np.linspace(1.0, 20.0, 6, dtype=np.float32).reshape(3, 2)

    def run(value):
        tx = make(value)
        state = tx.init(PARAMS)
        for factor in (1.0, 0.1):
            _, state = tx.update(jax.tree.map(lambda g, f=factor: g * f, GRADS), state, PARAMS)
        return state

    seen = optaxclip.metrics(jax.jit(jax.vmap(jax.vmap(run)))(values))
    assert {key: x.shape for key, x in seen.items()} == dict.fromkeys(seen, (3, 2))
    alone = jax.jit(lambda value: optaxclip.metrics(run(value)))
    for i, value in np.ndenumerate(values):
        for key, x in alone(value).items():
            np.testing.assert_allclose(seen[key][i], x, rtol=1e-5, err_msg=key)


NO_STATES = {
    "optimizer": (optax.adam(0.1), "this is an optimizer"),
    "clip": (optaxclip.clip_by_global_norm(1.0), "this is an optimizer"),
    "parameters": (PARAMS, r"got a dict with 3 leaves: pass what tx\.init"),
    "list": ([jnp.ones(1)], "got a list with 1 leaves"),
    "array": (jnp.ones(2), "got an array"),
    "number": (1.0, "got 1.0"),
    "None": (None, "got None"),
    "function": (jnp.tanh, "got "),
}


@pytest.mark.parametrize(
    "read",
    [optaxclip.metrics, optaxclip.explain, optaxclip.monitoring.bad_steps],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("case", NO_STATES)
def test_a_non_state_is_rejected(read, case):
    wrong, words = NO_STATES[case]
    with pytest.raises(ValueError, match=f"{read.__name__}: .*{words}"):
        read(wrong)


def test_parameters_that_are_one_bare_array_or_none():
    one = jnp.array([3.0, 4.0])
    for tx in (optaxclip.clip_by_leaf_norm(1.0), optaxclip.watch()):
        _, state = jax.jit(tx.update)(one, tx.init(one))
        seen = optaxclip.metrics(state)
        assert not [key for key in seen if key.endswith("/")]
        np.testing.assert_allclose(
            [x for key, x in seen.items() if key.endswith("/grad_norm")], [5.0]
        )
    empty = optaxclip.metrics(optaxclip.clip_by_leaf_norm(1.0).init({}))
    assert {key: x.shape for key, x in empty.items()} == {"clip/steps": ()}


def test_in_flax_states():
    """`nnx.Optimizer` wraps each array of the state in a variable; `TrainState` holds it whole."""
    x, tx = jnp.ones((2, 3)), optax.chain(optaxclip.clip_by_leaf_norm(0.5), optax.adam(0.1))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x)))(model))
    of_nnx = optaxclip.metrics(optimizer.opt_state)
    net = linen.Dense(2)
    state = TrainState.create(
        apply_fn=net.apply, params=net.init(jax.random.key(0), x)["params"], tx=tx
    )
    grads = jax.grad(lambda params: jnp.sum(net.apply({"params": params}, x)))(state.params)
    of_linen = optaxclip.metrics(state.apply_gradients(grads=grads))
    np.testing.assert_allclose(of_nnx["clip/grad_norm/bias"], 8**0.5, rtol=1e-6)
    assert jax.tree.map(float, of_nnx) == jax.tree.map(float, of_linen)
    assert all(isinstance(value, jax.Array) for value in of_nnx.values())
