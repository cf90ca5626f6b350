"""Real trainings that fail as people report it: what is named first.

Most are one compiled program, whose arguments say what is wrong.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests.catalogue import SILENT

STEPS, WIDTH = 150, 8
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(STEPS, 32, WIDTH)).astype(np.float32)


def layers(depth):
    """Square matrices that about keep the length of a vector."""
    shape, scale = (depth, WIDTH, WIDTH), WIDTH**0.5
    weights = (RNG.normal(size=shape) / scale).astype(np.float32)
    return {f"dense_{i}": x for i, x in enumerate(weights)}


class Fault(NamedTuple):
    """What is wrong with a training; as it is here, nothing.

    Attributes:
      rate: the learning rate.
      bound: of the clip.
      skip: the norm from which on a step is skipped.
      linear: 1 for layers without a nonlinearity, whose loss is not bounded.
      passes: what the gradients of each layer are multiplied by.
      broken: what the batch of step 71 is multiplied by.
    """

    rate: float = 0.3
    bound: float = 1.0
    skip: float = np.inf
    linear: float = 0.0
    passes: tuple[float, ...] = (1.0, 1.0, 1.0)
    broken: float = 1.0


def record(loss_of, params, tx, data):
    """What was seen at each step of a training."""

    def step(carry, x):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        now = oc.metrics(state) | {"loss": loss, "param_norm": optax.tree.norm(params)}
        return (params, state), now

    return jax.lax.scan(step, (params, tx.init(params)), data)[1]


@jax.jit
def train(fault, params, data):
    """A network of a few layers that learns half the tanh of its input."""

    def loss_of(params, x):
        h = x
        for name, passes in zip(params, fault.passes, strict=True):
            w = passes * params[name] + (1 - passes) * jax.lax.stop_gradient(params[name])
            h = h @ w
            h = jnp.where(fault.linear > 0, h, jnp.tanh(h))
        return jnp.mean(jnp.square(h - 0.5 * jnp.tanh(x)))

    data = data.at[70].multiply(fault.broken)
    optimizer = oc.skip_spikes(optax.sgd(fault.rate), fault.skip)
    clip = oc.clip_by_global_norm(fault.bound)
    return record(loss_of, params, optax.chain(oc.watch(candidates=[]), clip, optimizer), data)


TRAININGS = {
    "healthy": (SILENT, Fault()),
    "bound too low": ("clip-always-active", Fault(rate=3.0, bound=0.01)),
    "rate too high": ("learning-rate-too-high", Fault(rate=3.0, bound=np.inf, linear=1.0)),
    "rate too low": ("learning-rate-too-low", Fault(rate=1e-7)),
    "NaN in a batch": ("loss-not-finite", Fault(broken=np.nan)),
    "a large batch": ("spike", Fault(rate=0.1, linear=1.0, skip=100.0, broken=1e3)),
    "frozen": ("layer-frozen", Fault(passes=(1.0, 0.0, 1.0))),
    "cut off": ("zero-gradients", Fault(passes=(0.0, 0.0, 0.0))),
    "all skipped": ("every-step-skipped", Fault(skip=1e-6)),
}
PARAMS = layers(3)


@pytest.mark.parametrize("case", TRAININGS)
def test_a_training(case):
    first, fault = TRAININGS[case]
    found = oc.diagnose(train(jax.tree.map(np.float32, fault), PARAMS, DATA))
    assert (found[0].name if found else SILENT) == first, f"{found}"
    if case in ("NaN in a batch", "a large batch"):
        assert found[0].step == 71
    if case == "frozen":
        assert found[0].block == "dense_1"


def through_sigmoids(params, x):
    for i in range(len(params)):
        x = jax.nn.sigmoid(x @ params[f"dense_{i}"])
    return jnp.mean(jnp.square(x - 0.3))


def recurrent(params, x):
    """A plain network over forty steps, whose gradient grows 1.2-fold at each."""
    h = jnp.zeros_like(x)
    for t in range(40):
        h = jax.nn.relu((x if t == 0 else 0) + h @ params["kernel"])
    return jnp.mean(jnp.square(h @ params["dense_0"] - x[:, ::-1]))


def low_rank(params, x):
    """A change of a frozen matrix, of which one factor starts at zero."""
    return jnp.mean(jnp.square(x @ params["a"] @ params["b"] - x @ TARGET))


def through_dying_relus(params, x):
    """Biases that are pushed down until no input reaches over them."""
    hidden = jax.nn.relu(x @ params["dense_0"] + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["dense_1"] - x)) + 8 * jnp.mean(params["bias"])


def naive_cross_entropy(params, x):
    """The logarithm of 1 - p, which is 0 once p has rounded to 1."""
    p = jax.nn.sigmoid(20 * x @ params["dense_0"][:, 0])
    label = x[:, 0] > 0
    return -jnp.mean(jnp.where(label, jnp.log(p), jnp.log(1 - p)))


TARGET = RNG.normal(size=(WIDTH, 2)) @ RNG.normal(size=(2, WIDTH)) / WIDTH
TARGET = TARGET.astype(np.float32)
LORA = {"a": layers(1)["dense_0"][:, :2], "b": np.zeros((2, WIDTH), np.float32)}
OTHERS = {
    "sigmoids": ("norms-fall-with-depth", through_sigmoids, layers(12)),
    "recurrent": (
        "norms-exploding",
        recurrent,
        {"kernel": np.eye(WIDTH, dtype=np.float32) * np.float32(1.2), **layers(1)},
    ),
    "LoRA": (SILENT, low_rank, LORA),
    "dying ReLUs": (
        "layer-dead",
        through_dying_relus,
        {"bias": np.zeros(WIDTH, np.float32), **layers(2)},
    ),
    "log(0)": ("loss-not-finite", naive_cross_entropy, layers(1)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_networks(case):
    first, loss_of, params = OTHERS[case]
    tx = optax.chain(oc.watch(candidates=[]), optax.sgd(0.1))
    found = oc.diagnose(jax.jit(lambda: record(loss_of, params, tx, DATA))())
    assert (found[0].name if found else SILENT) == first, f"{found}"


def in_float16(params, x, scale):
    """The loss, and its gradients in float16 as they are without and with a loss scale."""

    def loss_of(params):
        h = x.astype(jnp.float16) @ params["dense_0"].astype(jnp.float16)
        errors = jnp.square(h.astype(jnp.float32) - 0.5 * x)
        # Back through float16: each gradient is rounded to it, and overflows above 65,504.
        return scale * jnp.mean(errors), jnp.mean(errors)

    (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, jax.tree.map(lambda g: g.astype(jnp.float16).astype(jnp.float32) / scale, grads)


@pytest.mark.parametrize("dynamic", [False, True], ids=["no loss scale", "loss scale"])
def test_float16(dynamic):
    """An overflow that lowers the loss scale is how it is meant to be; any other is a fault."""
    tx = optax.chain(oc.watch(candidates=[]), oc.skip_nonfinite(optax.sgd(0.05)))
    params = layers(1)
    data = DATA if dynamic else jnp.asarray(DATA).at[70].multiply(1e4)

    def step(carry, x):
        params, state, scale = carry
        loss, grads = in_float16(params, x, scale if dynamic else jnp.float32(1))
        updates, state = tx.update(grads, state, params)
        fine = jnp.isfinite(optax.tree.norm(grads))
        now = oc.metrics(state) | {"loss": loss}
        if dynamic:
            now |= {"loss_scale": scale}
        scale = jnp.where(fine, scale, scale / 2)
        return (optax.apply_updates(params, updates), state, scale), now

    start = (params, tx.init(params), jnp.float32(2.0**20))
    run = jax.jit(lambda: jax.lax.scan(step, start, data)[1])()
    assert 0 < run["skip/steps"][-1] < 20
    found = oc.diagnose(run)
    assert [x.name for x in found][:1] == ([] if dynamic else ["norm-overflow"]), f"{found}"
