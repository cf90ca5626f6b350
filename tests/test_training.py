"""Full training steps in Flax nnx, Flax linen and Equinox: the same clip, the same path strings, the same numbers."""

import itertools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optaxclip

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
Y = jnp.ones((4, 1)) * 3
BLOCKS = ["blocks/0", "head"]


def clip():
    """An adaptive clip by layer: its state is kept per block, keyed by path."""
    threshold = optaxclip.at_most(optaxclip.lag(optax.scale(0.9)), 2.0)
    return optaxclip.clip_by(threshold, scope=optaxclip.groups())


def seen_blocks(metrics):
    prefix = "clip/grad_norm/"
    return sorted(name.removeprefix(prefix) for name in metrics if name.startswith(prefix))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 2, rngs=rngs)])
        self.head = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.blocks[0](x)))


def run_nnx(steps):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(clip(), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss, optaxclip.metrics(optimizer.opt_state)

    return [step(model, optimizer) for _ in range(steps)]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1, name="head")(jnp.tanh(linen.Dense(2, name="blocks/0")(x)))


def run_linen(steps):
    net = LinenNet()
    params = net.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.chain(clip(), optax.sgd(0.1)))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2))(state.params)
        state = state.apply_gradients(grads=grads)
        return state, (loss, optaxclip.metrics(state))

    history = []
    for _ in range(steps):
        state, seen = step(state)
        history.append(seen)
    return history


class EqxNet(eqx.Module):
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        self.blocks = [eqx.nn.Linear(3, 2, key=key)]
        self.head = eqx.nn.Linear(2, 1, key=key)

    def __call__(self, x):
        return self.head(jnp.tanh(self.blocks[0](x)))


def run_equinox(steps):
    model = EqxNet(jax.random.key(0))
    tx = optax.chain(clip(), optax.sgd(0.1))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(X) - Y) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, (loss, optaxclip.metrics(state))

    history = []
    for _ in range(steps):
        model, state, seen = step(model, state)
        history.append(seen)
    return history


@pytest.mark.parametrize("run", [run_nnx, run_linen, run_equinox])
def test_a_layerwise_adaptive_clip_trains(run):
    history = run(12)
    losses, metrics = zip(*history, strict=True)
    assert losses[-1] < losses[0] / 2
    assert seen_blocks(metrics[-1]) == BLOCKS
    assert metrics[-1]["clip/steps"] == 12 and metrics[-1]["clip/clipped_fraction"] > 0
    for before, after in itertools.pairwise(metrics):
        bound = min(2.0, 0.9 * float(before["clip/grad_norm/head"]))
        np.testing.assert_allclose(after["clip/bound/head"], bound, rtol=1e-6)


def test_agc_with_an_excluded_head_in_nnx():
    model = NnxNet(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tx = optax.chain(optaxclip.adaptive_grad_clip(1e-9, exclude="^head/"), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
    optimizer.update(model, grads)
    after = nnx.state(model, nnx.Param)
    chex.assert_trees_all_close(after["blocks"], before["blocks"], atol=1e-9)
    assert float(jnp.abs(after["head"]["bias"][...] - before["head"]["bias"][...]).max()) > 0.1
