"""Every optimizer that Optax exports, after our clips: the same numbers as clipping by hand, in
NumPy, before it.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

MODULES = {"optax": optax, "contrib": optax.contrib}
RATES = {
    "learning_rate",
    "max_learning_rate",
}  # what makes a function an optimizer, not a part of one

# What an optimizer needs besides a learning rate.
NEEDS = {
    "contrib.schedule_free": {"base_optimizer": optax.sgd(0.1)},
    "contrib.galore": {"rank": 1},
    "optax.polyak_sgd": {"max_learning_rate": 0.1},
    "optax.noisy_sgd": {"key": jax.random.key(0)},
}
# What `update` gets besides gradients and parameters, if that is not only the loss.
EXTRA_ARGS = {
    "optax.lbfgs": ("value", "grad", "value_fn"),
    "contrib.sophia": ("obj_fn",),
    "contrib.sam": (),
}
# What is not tested here, and why.
EXCLUDED = {
    "contrib.dpsgd": "takes the gradient of each example and clips these itself",
    "optax.lookahead": "its parameters are pairs: the clip goes inside, see test_wrappers.py",
}
# Optimizers built from others, without their own learning rate.
WRAPPERS = {
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "contrib.sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),
}
# Everything else that returns a transformation: parts from which optimizers are built, including
# `scale_by_*`.
PARTS = {
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "apply_every",
    "apply_if_finite",
    "centralize",
    "chain",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "conditionally_mask",
    "conditionally_transform",
    "ema",
    "flatten",
    "freeze",
    "identity",
    "inject_hyperparams",
    "inject_stateful_hyperparams",
    "keep_params_nonnegative",
    "masked",
    "measure_with_ema",
    "multi_transform",
    "named_chain",
    "normalize_by_update_norm",
    "partition",
    "scale",
    "selective_transform",
    "set_to_zero",
    "snapshot",
    "stateless",
    "stateless_with_tree_map",
    "trace",
    "with_extra_args_support",
    "zero_nans",
    "differentially_private_aggregate",
    "normalize",
    "reduce_on_plateau",
    "split_real_and_imaginary",
    "monitor",
}

# Optax's optimizers promote dtypes and ranks; our clips, which do not, are tested elsewhere.
pytestmark = pytest.mark.usefixtures("as_users")


def functions():
    """All public functions of Optax, with what they take and what they return."""
    for prefix, module in MODULES.items():
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith(("_", "scale_by_")):
                yield f"{prefix}.{name}", function, inspect.signature(function)


OPTIMIZERS = {
    name: function
    for name, function, s in functions()
    if RATES & set(s.parameters) and name not in EXCLUDED
}


def optimizer(name):
    if name in WRAPPERS:
        return WRAPPERS[name]()
    rate = (
        {"learning_rate": 0.1}
        if "learning_rate" in inspect.signature(OPTIMIZERS[name]).parameters
        else {}
    )
    return OPTIMIZERS[name](**rate, **NEEDS.get(name, {}))


def test_no_exported_optimizer_is_missed():
    """An optimizer takes a learning rate, or is named above; so is every part. A new name must be
    put in its place.
    """
    transformations = {
        name for name, _, s in functions() if "GradientTransformation" in str(s.return_annotation)
    }
    named = (
        set(OPTIMIZERS)
        | set(WRAPPERS)
        | set(EXCLUDED)
        | {f"{m}.{part}" for m in MODULES for part in PARTS}
    )
    assert transformations - named == set()
    assert len(OPTIMIZERS) >= 47
    assert {"optax.adam", "optax.lbfgs", "optax.polyak_sgd", "contrib.muon", "contrib.momo"} <= set(
        OPTIMIZERS
    )
    for name in set(NEEDS) | set(EXCLUDED) | set(WRAPPERS):
        assert hasattr(MODULES[name.partition(".")[0]], name.partition(".")[2])


def norm(*arrays):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))


def shortened(x, length, bound):
    return x if length <= bound else (x * (bound / length)).astype(x.dtype)


def by_global_norm(grads, params, norms):
    return {k: shortened(g, norms[-1], 1.0) for k, g in grads.items()}


def by_leaf_norm(grads, params, norms):
    return {k: shortened(g, norm(g), 0.5) for k, g in grads.items()}


def by_unit(grads, params, norms):
    """AGC: a column of "w" is a unit, and all of "b"."""
    columns = [
        shortened(g, norm(g), 0.3 * max(norm(w), 1e-3))
        for g, w in zip(grads["w"].T, params["w"].T, strict=True)
    ]
    return {
        "b": shortened(grads["b"], norm(grads["b"]), 0.3 * max(norm(params["b"]), 1e-3)),
        "w": np.stack(columns, 1),
    }


def by_the_norm_before(grads, params, norms):
    bound = 1.5 * norms[-2] if len(norms) > 1 else np.inf
    return {k: shortened(g, norms[-1], bound) for k, g in grads.items()}


CLIPS = {
    "global": (optaxclip.clip_by_global_norm(1.0), by_global_norm),
    "leaf": (optaxclip.clip_by_leaf_norm(0.5), by_leaf_norm),
    "adaptive": (optaxclip.adaptive_grad_clip(0.3), by_unit),
    "lag": (optaxclip.clip_by(optaxclip.thresholds.lag(optax.scale(1.5))), by_the_norm_before),
}
PARAMS = {"b": np.float32([0.5, -1.0]), "w": np.float32([[1.0, -0.2], [0.3, 2.0], [-1.5, 0.7]])}
TARGET = {"b": np.float32([0.0, 1.0]), "w": np.float32([[0.0, 1.0], [1.0, -1.0], [2.0, 0.0]])}
STEPS = [0.4, 5.0, 1.0]  # each clip changes some of these gradients, and leaves another as it is


def loss(params):
    return sum(jnp.sum(jnp.square(params[k] - TARGET[k])) for k in TARGET)


def gradients(params, size):
    """Gradients of a loss on a batch that is not the whole: close to the true ones, of one more
    size each step.
    """
    return {k: np.float32(size * 0.2 * (params[k] - TARGET[k]) + 0.01 * size) for k in PARAMS}


def stepper(tx, extra_args=("value",)):
    """A jitted step that passes the optimizer what it asks for, and the optimizer's `init`."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, grads):
        known = {"value": loss(params), "grad": grads, "value_fn": loss, "obj_fn": loss}
        updates, state = tx.update(
            grads, state, params, **{name: known[name] for name in extra_args}
        )
        return optax.apply_updates(params, updates), state

    return step, tx.init


def run(tx, clip=None):
    """The parameters after each of three steps; `clip` changes the gradients by hand."""
    (step, init), params, norms, seen = tx, PARAMS, [], []
    state = init(jax.tree.map(jnp.asarray, params))
    for size in STEPS:
        params = jax.tree.map(np.asarray, params)
        grads = gradients(params, size)
        norms.append(norm(*grads.values()))
        params, state = step(params, state, clip(grads, params, norms) if clip else grads)
        seen.append(params)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIMIZERS | WRAPPERS))
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
def test_clip_then_optimizer_is_clipping_by_hand(name):
    extra_args = EXTRA_ARGS.get(name, ("value",))
    alone = stepper(optimizer(name), extra_args)
    usual = name in ("optax.sgd", "optax.adamw", "optax.lion", "contrib.muon")
    for clip, by_hand in (CLIPS[clip] for clip in (CLIPS if usual else ("global", "lag"))):
        got = run(stepper(optax.chain(clip, optimizer(name)), extra_args))
        want = run(alone, by_hand)
        chex.assert_tree_all_finite(got)
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_the_clips_by_hand_change_some_steps_and_not_others(name):
    """Otherwise the test above would prove nothing."""
    changed, norms = [], []
    for size in STEPS:
        grads = gradients(PARAMS, size)
        norms.append(norm(*grads.values()))
        clipped = CLIPS[name][1](grads, PARAMS, norms)
        changed += [not np.array_equal(clipped[k], grads[k]) for k in grads]
    assert any(changed) and not all(changed)
