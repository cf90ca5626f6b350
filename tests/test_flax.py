"""The same network in nnx, linen and Equinox: the same paths, norms and training, and what only one
of them has.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optaxclip

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Y = np.float32([[3.0], [1.0], [0.0], [-2.0]])
RNG = np.random.default_rng(0)
SIZES = {"inner": (3, 5), "outer": (5, 1)}
WEIGHTS = {
    name: {"bias": RNG.normal(size=shape[1]), "kernel": RNG.normal(size=shape)}
    for name, shape in SIZES.items()
}
WEIGHTS = jax.tree.map(np.float32, WEIGHTS)
STEPS = 5


pytestmark = pytest.mark.usefixtures("as_users")  # Flax's and Optax's own steps promote dtypes


def mse(predicted):
    return jnp.mean((predicted - Y) ** 2)


def in_nnx(tx):
    class Net(nnx.Module):
        def __init__(self):
            self.inner, self.outer = (nnx.Linear(*SIZES[name], rngs=nnx.Rngs(0)) for name in SIZES)

        def __call__(self, x):
            return self.outer(jnp.tanh(self.inner(x)))

    model = nnx.eval_shape(Net)
    nnx.update(model, WEIGHTS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: mse(m(X)))(model)
        optimizer.update(model, grads)
        return {"loss": loss, **optaxclip.metrics(optimizer.opt_state)}

    return [step(model, optimizer) for _ in range(STEPS)]


def in_linen(tx):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1, name="outer")(jnp.tanh(linen.Dense(5, name="inner")(x)))

    state = TrainState.create(apply_fn=Net().apply, params=WEIGHTS, tx=tx)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda params: mse(state.apply_fn({"params": params}, X)))(
            state.params
        )
        state = state.apply_gradients(grads=grads)
        return state, {"loss": loss, **optaxclip.metrics(state)}

    seen = []
    for _ in range(STEPS):
        state, now = step(state)
        seen.append(now)
    return seen


def in_equinox(tx):
    class Dense(eqx.Module):
        bias: jax.Array
        kernel: jax.Array

    class Net(eqx.Module):
        inner: Dense
        outer: Dense
        name: str = "net"  # not an array: Equinox filters it out

        def __call__(self, x):
            return (
                jnp.tanh(x @ self.inner.kernel + self.inner.bias) @ self.outer.kernel
                + self.outer.bias
            )

    model = Net(**{name: Dense(**jax.tree.map(jnp.asarray, w)) for name, w in WEIGHTS.items()})
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: mse(m(X)))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, {"loss": loss, **optaxclip.metrics(state)}

    seen = []
    for _ in range(STEPS):
        model, state, now = step(model, state)
        seen.append(now)
    return seen


LAYERS = {"^inner/": "first", "^outer/": "last"}
LAG = optaxclip.thresholds.lag(optax.chain(optax.ema(0.5), optax.scale(0.8)))
CLIPS = {
    "leaf": (
        optaxclip.clip_by_leaf_norm(0.5),
        ["inner/bias", "inner/kernel", "outer/bias", "outer/kernel"],
    ),
    "module": (optaxclip.clip_by_group_norm(0.5), ["inner", "outer"]),
    "groups": (
        optaxclip.clip_by_group_norm({"first": 0.5, "last": 9.0}, LAYERS),
        ["first", "last"],
    ),
    "adaptive": (optaxclip.clip_by(LAG, scope=optaxclip.scopes.groups()), ["inner", "outer"]),
    "excluded": (optaxclip.adaptive_grad_clip(0.1, exclude="^outer/|bias$"), []),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_same_paths_and_the_same_training_in_all_three(name):
    clip, blocks = CLIPS[name]
    runs = [
        run(optax.chain(clip, optax.sgd(0.1, momentum=0.9)))
        for run in (in_nnx, in_linen, in_equinox)
    ]
    prefix = "clip/grad_norm/"
    for run in runs:
        assert [
            key.removeprefix(prefix) for key in sorted(run[-1]) if key.startswith(prefix)
        ] == blocks
        assert int(run[-1]["clip/steps"]) == STEPS and float(run[-1]["clip/clipped_fraction"]) > 0
    for nnx_step, *others in zip(*runs, strict=True):
        for other in others:
            assert nnx_step.keys() == other.keys()
            for key, value in nnx_step.items():
                np.testing.assert_allclose(value, other[key], rtol=1e-4, err_msg=key)


def test_the_adaptive_clip_follows_each_layer():
    """The bound of a step is 0.8 of the running mean of the norms before it, layer by layer, in
    nnx.
    """
    seen = in_nnx(optax.chain(CLIPS["adaptive"][0], optax.sgd(0.1)))
    for layer in ("inner", "outer"):
        mean, weight = 0.0, 0.0
        for step in seen:
            bound = 0.8 * mean / weight if weight else np.inf
            np.testing.assert_allclose(step[f"clip/bound/{layer}"], bound, rtol=1e-5)
            mean = 0.5 * mean + 0.5 * float(step[f"clip/grad_norm/{layer}"])
            weight = 0.5 * weight + 0.5


def test_layers_stacked_by_nnx_vmap_have_a_norm_each():
    """`batch_axes` says which leading axes number layers: each is clipped as it would be alone."""

    @nnx.vmap(in_axes=0)
    def stacked(key):
        return nnx.Linear(3, 2, rngs=nnx.Rngs(key))

    model = stacked(jax.random.split(jax.random.key(0), 4))
    grads = jax.tree.map(lambda w: w * 100, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(
        model, optaxclip.adaptive_grad_clip(0.5, axis=..., batch_axes=1), wrt=nnx.Param
    )
    before = np.asarray(model.kernel[...])
    optimizer.update(model, grads)
    np.testing.assert_allclose(model.kernel[...], 1.5 * before, rtol=1e-5)
    moved = np.linalg.norm(np.asarray(model.kernel[...]) - before, axis=(1, 2))
    np.testing.assert_allclose(moved, 0.5 * np.linalg.norm(before, axis=(1, 2)), rtol=1e-5)


def test_layers_stacked_by_nnx_vmap_are_named_and_clipped_one_by_one():
    @nnx.vmap(in_axes=0)
    def stacked(key):
        return nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(key))

    model = stacked(jax.random.split(jax.random.key(0), 4))
    optimizer = nnx.Optimizer(
        model, optaxclip.clip_by_leaf_norm(0.5, stacked="kernel"), wrt=nnx.Param
    )
    before = np.asarray(model.kernel[...])
    optimizer.update(model, jax.tree.map(lambda w: w * 100, nnx.state(model, nnx.Param)))
    moved = np.linalg.norm(np.asarray(model.kernel[...]) - before, axis=(1, 2))
    np.testing.assert_allclose(moved, 0.5, rtol=1e-5)
    seen = optaxclip.metrics(optimizer.opt_state)
    np.testing.assert_allclose(
        seen["clip/grad_norm/kernel[3]"], 100 * np.linalg.norm(before[3]), rtol=1e-5
    )


def test_masks_and_partitions_that_are_functions_of_the_tree_in_nnx():
    def kernels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), tree
        )

    masked = optax.chain(optax.masked(optaxclip.clip_by_leaf_norm(0.5), kernels), optax.sgd(0.1))
    excluding = optax.chain(optaxclip.clip_by_leaf_norm(0.5, exclude="bias$"), optax.sgd(0.1))
    for one, two in zip(in_nnx(masked), in_nnx(excluding), strict=True):
        assert jax.tree.map(float, one) == jax.tree.map(float, two)
