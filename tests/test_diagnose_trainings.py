"""Real trainings that fail in ways people report: `diagnose` names the right sign first.

Most are one compiled program, whose arguments say what goes wrong.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.wrappers import dynamic_loss_scale
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
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_networks(case):
    first, loss_of, params = OTHERS[case]
    tx = optax.chain(oc.watch(candidates=[]), optax.sgd(0.1))
    found = oc.diagnose(jax.jit(lambda: record(loss_of, params, tx, DATA))())
    assert (found[0].name if found else SILENT) == first, f"{found}"


def cross_entropy(params, x):
    """Which number is the largest, by ReLUs, and by the logarithm of probabilities."""
    h = x
    for i in range(2):
        h = jax.nn.relu(h @ params[f"dense_{i}"] + params[f"bias_{i}"])
    p = jax.nn.softmax(h @ params["dense_2"] + params["bias_2"])
    right = jnp.argmax(x, axis=1, keepdims=True) == np.arange(WIDTH)[None]
    return -jnp.mean(jnp.log(jnp.sum(p, axis=1, where=right)))


RELU = layers(3) | {f"bias_{i}": np.zeros((1, WIDTH), np.float32) for i in range(3)}


@jax.jit
def classify(rate, broken):
    tx = optax.chain(oc.watch(candidates=[]), optax.sgd(rate))
    data = jnp.asarray(DATA).at[70].multiply(broken)
    return record(cross_entropy, RELU, tx, data)


@pytest.mark.parametrize(
    ("rate", "broken", "first", "step"),
    [
        (0.3, 1.0, SILENT, None),
        # Units of ReLU die one by one, until no batch reaches any.
        (4.0, 1.0, "layer-dead", 11),
        (10.0, 1.0, "layer-dead", 21),
        # Logits of 100 give a probability of 0, and the loss takes its logarithm.
        (0.3, 100.0, "loss-not-finite", 71),
    ],
    ids=["healthy", "dying ReLU", "dead ReLU", "log(0)"],
)
def test_rectifiers_and_logarithms(rate, broken, first, step):
    seen = classify(np.float32(rate), np.float32(broken))
    found = oc.diagnose(seen)
    assert [sign.name for sign in found] == [first] * (first != SILENT), f"{found}"
    assert not found or found[0].step == step
    if first == "loss-not-finite":
        assert np.isinf(seen["loss"][70]) and "log" in found[0].fix


def in_half(params, x):
    """The tanh of the input, by two linear layers in float16."""
    h = x
    for w in jax.tree.map(jnp.float16, params).values():
        h = h @ w
    return jnp.mean(jnp.square((h - jnp.tanh(x)).astype(jnp.float32)))


@jax.jit
def train_in_half(scale, most, broken):
    """With a loss scale that starts here, doubles every fifth step, and ends there."""
    optimizer = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.05))
    limits = {"min_scale": jnp.minimum(scale, most), "max_scale": most}
    scaled = dynamic_loss_scale(optimizer, scale, growth_interval=5, **limits)
    tx = optax.chain(oc.watch(candidates=[]), scaled)

    def step(carry, x):
        params, state = carry
        scale = state[1].loss_scale
        loss, grads = jax.value_and_grad(lambda p: in_half(p, x) * scale)(params)
        updates, state = tx.update(grads, state, params)
        now = oc.metrics(state) | {"loss": loss / scale}
        return (optax.apply_updates(params, updates), state), now

    params, data = layers(2), jnp.asarray(DATA).at[70].multiply(broken)
    return jax.lax.scan(step, (params, tx.init(params)), data.astype(jnp.float16))[1]


@pytest.mark.parametrize(
    ("scale", "most", "broken", "first"),
    [
        (1.0, 1.0, 1e3, "norm-overflow"),
        (1.0, 2.0**24, 1e3, SILENT),
        (2.0**24, 2.0**24, 1.0, "every-step-skipped"),
    ],
    ids=["no loss scale", "dynamic loss scale", "too large a loss scale"],
)
def test_float16(scale, most, broken, first):
    seen = train_in_half(*map(np.float32, (scale, most, broken)))
    # Norms overflow in all of these.
    assert not np.isfinite(seen["watch/grad_norm"]).all()
    found = oc.diagnose(seen)
    assert (found[0].name if found else SILENT) == first, f"{found}"
    assert first != "norm-overflow" or found[0].step == 71
