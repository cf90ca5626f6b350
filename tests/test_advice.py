"""What an error advises works: each is raised by one call, and followed by the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optaxclip as oc

GRADS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
ADAM = optax.adam(1e-3)


pytestmark = pytest.mark.usefixtures("as_users")  # transformations of Optax's promote dtypes


class Advice(NamedTuple):
    """One error.

    Attributes:
      wrong: what raises it.
      says: a part of the message that tells what to write.
      right: that, written.
    """

    wrong: Callable[[], Any]
    says: str
    right: Callable[[], Any]


def run(tx, grads=GRADS, params=GRADS, **more):
    """Two updates, the second one traced."""
    state = tx.init(params)
    _, state = tx.update(grads, state, params, **more)
    return jax.eval_shape(tx.update, grads, state, params, **more)


def state_of(tx):
    return tx.update(GRADS, tx.init(GRADS), GRADS)[1]


def runs_of(tx):
    """The state of three runs."""
    return jax.vmap(lambda factor: tx.init(jax.tree.map(lambda g: factor * g, GRADS)))(jnp.ones(3))


def in_shard_map(tx, **options):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def clip(grads):
        return tx.update(grads, tx.init(grads), grads)[0]

    options = {"in_specs": P(), "out_specs": P(), **options}
    return jax.eval_shape(jax.shard_map(clip, mesh=mesh, **options), jnp.ones((4, 2)))


def in_pmap(tx, **options):
    def clip(grads):
        return tx.update(grads, tx.init(grads))[0]

    return jax.pmap(clip, devices=jax.devices()[:2], **options)(jnp.ones((2, 3)))


class Model(eqx.Module):
    weight: jax.Array
    activation: Callable = jax.nn.relu


MODEL = Model(jnp.ones(3))
FILTERED = eqx.filter(MODEL, eqx.is_inexact_array)
FULL = {"check_vma": False}
UNITS = oc.scopes.units


def loss(params, example):
    return jnp.sum((params["w"] @ example) ** 2)


def mean_and_norms(weights=None, **options):
    step = oc.clipped_value_and_grad(loss, 1.0, **options)
    return step({"w": jnp.ones((3, 2))}, jnp.ones((4, 2)), weights=weights)


ADVICE = {
    # Of a clip by hand.
    "a state of None": Advice(
        lambda: oc.zclip().update(GRADS, None),
        "Write state = tx.init(params) once, and updates, state = tx.update(grads, state, params)",
        lambda: run(oc.zclip()),
    ),
    "parameters": Advice(
        lambda: oc.adaptive_grad_clip(0.1).update(GRADS, oc.adaptive_grad_clip(0.1).init(GRADS)),
        "write tx.update(grads, state, params)",
        lambda: run(oc.adaptive_grad_clip(0.1)),
    ),
    "another scope": Advice(
        lambda: oc.zclip().update(GRADS, oc.zclip(scope=oc.scopes.leaf).init(GRADS)),
        "initialise with state = tx.init(params), and keep what update returns",
        lambda: run(oc.zclip()),
    ),
    "a model with functions": Advice(
        lambda: oc.skip_nonfinite(ADAM).init(MODEL),
        "tx.init(eqx.filter(model, eqx.is_inexact_array))",
        lambda: run(oc.skip_nonfinite(ADAM), FILTERED, FILTERED),
    ),
    "a placeholder": Advice(
        lambda: optax.tree.map_params(oc.adagc(), lambda x: x, oc.adagc().init(GRADS)),
        "jax.eval_shape(tx.init, params)",
        lambda: (
            jax.eval_shape((tx := oc.adagc()).init, GRADS),
            optax.tree.map_params(tx, lambda x: x, oc.adagc().init(GRADS)),
        ),
    ),
    # Of parts.
    "a number": Advice(
        lambda: oc.clip_by_global_norm(-1.0),
        "a number from 0 to inf, an array of such, a schedule (a function of the step) or a"
        " threshold (an optax transformation of norms)",
        lambda: [
            run(oc.clip_by_global_norm(bound))
            for bound in (0, jnp.inf, jnp.array(1.0), lambda step: 1.0, oc.thresholds.zscore())
        ],
    ),
    "a number for AGC": Advice(
        lambda: oc.adaptive_grad_clip(None),
        "a schedule (a function of the step)",
        lambda: run(oc.adaptive_grad_clip(lambda step: 0.01)),
    ),
    "a number for values": Advice(
        lambda: oc.clip("1"),
        "an array of such, a schedule (a function of the step) or a threshold",
        lambda: (
            [run(oc.clip(bound)) for bound in (1.0, jnp.array(1.0), oc.thresholds.zscore())]
            + [jax.jit(lambda bound: oc.clip(bound).update(GRADS, None)[0])(1.0)]
        ),
    ),
    "a percentile": Advice(
        lambda: oc.autoclip(101.0),
        "from 0 to 100",
        lambda: [run(oc.autoclip(percentile, window=4)) for percentile in (0.0, 100.0)],
    ),
    "a threshold that was not called": Advice(
        lambda: oc.clip_by(oc.thresholds.zscore),
        "write zscore(...), with parentheses",
        lambda: run(oc.clip_by(oc.thresholds.zscore())),
    ),
    "a clip that was not called": Advice(
        lambda: oc.clip_by(oc.zclip),
        "write zclip(...), with parentheses",
        lambda: run(oc.zclip()),
    ),
    "an optimizer that was not called": Advice(
        lambda: oc.skip_nonfinite(optax.adam),
        "write adam(...), with parentheses",
        lambda: run(oc.skip_nonfinite(optax.adam(1e-3))),
    ),
    "a pattern that is none": Advice(
        lambda: oc.clip_by_global_norm(1.0, exclude="*b"),
        "a regular expression, such as 'bias$'",
        lambda: run(oc.clip_by_global_norm(1.0, exclude="b$")),
    ),
    "names of blocks in a list": Advice(
        lambda: oc.thresholds.by_name([1.0, 2.0]),
        "a mapping, from the name of each block to its",
        lambda: run(oc.clip_by(oc.thresholds.by_name({"b": 1.0, "w": 2.0}), scope=oc.scopes.leaf)),
    ),
    "an action that was not called": Advice(
        lambda: oc.clip_by(1.0, action=oc.actions.smooth),
        "write smooth(...), with parentheses",
        lambda: run(oc.clip_by(1.0, action=oc.actions.smooth())),
    ),
    "an action that was called": Advice(
        lambda: oc.actions.zero(),
        "write actions.zero, without parentheses",
        lambda: run(oc.clip_by(1.0, action=oc.actions.zero)),
    ),
    "a list": Advice(
        lambda: oc.clip_by([1.0, 2.0], scope=oc.scopes.leaf),
        "an array of such, a schedule (a function of the step) or a threshold (an optax"
        " transformation of norms), got the list [1.0, 2.0]",
        lambda: run(oc.clip_by(jnp.array([1.0, 2.0]), scope=oc.scopes.leaf)),
    ),
    "a history by its key": Advice(
        lambda: oc.History()["loss"],
        "write history.arrays()['loss']",
        lambda: ((h := oc.History()).append({}, loss=1.0), h.arrays()["loss"]),
    ),
    "a scope that was not called": Advice(
        lambda: oc.clip_by(1.0, scope=oc.scopes.groups),
        "write groups(...), with parentheses",
        lambda: run(oc.clip_by(1.0, scope=oc.scopes.groups())),
    ),
    "a scope for a label": Advice(
        lambda: oc.clip_by_group_norm(1.0, oc.scopes.groups()),
        "label must be a function of a leaf's path, or a mapping of regular expressions to names",
        lambda: [
            run(oc.clip_by_group_norm(1.0, label))
            for label in (lambda path: path[:1], {"b": "one", "w": "other"})
        ],
    ),
    "a clip for a threshold": Advice(
        lambda: oc.clip_by(oc.zclip()),
        "use it as it is, or pass one of optaxclip.thresholds, got a transformation of zclip",
        lambda: [run(oc.zclip()), run(oc.clip_by(oc.thresholds.zscore()))],
    ),
    "an optimizer for a threshold": Advice(
        lambda: oc.clip_by(ADAM),
        "put it beside the clip, optax.chain(clip, optimizer)",
        lambda: run(optax.chain(oc.clip_by(1.0), ADAM)),
    ),
    "a clip of Optax's for a threshold": Advice(
        lambda: oc.clip_by(optax.clip_by_global_norm(1.0)),
        "a number, a schedule or a threshold of norms; this one takes gradients",
        lambda: run(oc.clip_by(1.0)),
    ),
    "an optimizer for a threshold of losses": Advice(
        lambda: oc.skip_spikes(ADAM, loss_threshold=optax.rmsprop(0.1)),
        "a number, a schedule or a threshold",
        lambda: run(oc.skip_spikes(ADAM, loss_threshold=3.0), loss=1.0),
    ),
    "a bare vector": Advice(
        lambda: run(oc.clip_by_leaf_norm(jnp.ones(2))),
        "a mapping of paths, such as {'b': 1.0, 'w': 1.0}",
        lambda: run(oc.clip_by_leaf_norm({"b": 1.0, "w": 1.0})),
    ),
    "a size that is injected": Advice(
        lambda: optax.inject_hyperparams(oc.autoclip)(window=4).init(GRADS),
        "inject_hyperparams(autoclip, static_args=('window',))",
        lambda: run(optax.inject_hyperparams(oc.autoclip, static_args=("window",))(window=4)),
    ),
    "complex numbers": Advice(
        lambda: run(oc.clip_by_value(-1.0, 1.0), {"z": jnp.ones(2, complex)}, {"z": jnp.ones(2)}),
        "clip() takes their modulus",
        lambda: run(oc.clip(1.0), {"z": jnp.ones(2, complex)}, {"z": jnp.ones(2)}),
    ),
    "a rank without a convention": Advice(
        lambda: oc.clip_by(1.0, scope=UNITS()).init({"x": jnp.ones([2] * 6)}),
        "Pass the axes that a unit spans, for example as a function of the path",
        lambda: oc.clip_by(1.0, scope=UNITS(lambda path: (0, 1))).init({"x": jnp.ones([2] * 6)}),
    ),
    # Of wrappers.
    "a chain": Advice(
        lambda: oc.skip_spikes(optax.clip(1.0), optax.sgd(0.1)),
        "skip_spikes(optax.chain(clip, optimizer), threshold)",
        lambda: run(oc.skip_spikes(optax.chain(optax.clip(1.0), optax.sgd(0.1)), 2.0)),
    ),
    "a loss": Advice(
        lambda: run(oc.skip_spikes(ADAM, loss_threshold=2.0)),
        "write tx.update(grads, state, params, loss=loss)",
        lambda: run(oc.skip_spikes(ADAM, loss_threshold=2.0), loss=1.0),
    ),
    "no optimizer": Advice(
        lambda: oc.reset_moments(optax.scale_by_adam),
        "an optimizer, such as optax.adam(1e-3)",
        lambda: run(oc.reset_moments(optax.adam(1e-3))),
    ),
    # Of what is read.
    "an optimizer for its state": Advice(
        lambda: oc.metrics((ADAM, GRADS)),
        "write state = tx.init(params), updates, state = tx.update(grads, state, params), and"
        " metrics(state)",
        lambda: oc.metrics(state_of(oc.zclip())),
    ),
    "parameters for a state": Advice(
        lambda: oc.explain(GRADS),
        "pass what tx.init and tx.update return",
        lambda: oc.explain(state_of(oc.zclip())),
    ),
    "a state that jax.tree does not see": Advice(
        lambda: oc.metrics((1, eqx.nn.StateIndex(jnp.ones(2)), object())),
        "does not look into object",
        lambda: oc.metrics((1, state_of(oc.zclip()))),
    ),
    "several runs": Advice(
        lambda: oc.explain(runs_of(oc.zclip())),
        "pick one, jax.tree.map(lambda x: x[0], opt_state)",
        lambda: oc.explain(jax.tree.map(lambda x: x[0], runs_of(oc.zclip()))),
    ),
    "a state in a history": Advice(
        lambda: oc.History().append(state_of(oc.zclip())),
        "write history.append(optaxclip.metrics(opt_state), loss=loss)",
        lambda: oc.History().append(oc.metrics(state_of(oc.zclip())), loss=1.0),
    ),
    # On devices.
    "gradients that may be parts": Advice(
        lambda: in_shard_map(oc.clip_by_global_norm(1.0), **FULL),
        "axis_names=() if they are already the same on every device",
        lambda: in_shard_map(oc.clip_by_global_norm(1.0, axis_names=()), **FULL),
    ),
    "gradients that are parts": Advice(
        lambda: in_shard_map(oc.zclip(), in_specs=P("data"), out_specs=P("data"), **FULL),
        "axis_names=('data',) if each device holds a different part",
        lambda: in_shard_map(
            oc.zclip(axis_names=("data",)), in_specs=P("data"), out_specs=P("data"), **FULL
        ),
    ),
    "types instead of names": Advice(
        lambda: in_shard_map(oc.zclip(), in_specs=P("data"), out_specs=P("data"), **FULL),
        "Or keep check_vma=True, where nothing need be said",
        lambda: in_shard_map(oc.zclip(), in_specs=P("data"), out_specs=P("data")),
    ),
    "pmap without a name": Advice(
        lambda: in_pmap(oc.clip_by_global_norm(1.0)),
        "Pass axis_names=() to the clip",
        lambda: in_pmap(oc.clip_by_global_norm(1.0, axis_names=())),
    ),
    "pmap without a name, named": Advice(
        lambda: in_pmap(oc.clip_by_global_norm(1.0)),
        'jax.pmap(step, axis_name="batch")',
        lambda: in_pmap(oc.clip_by_global_norm(1.0, axis_names="batch"), axis_name="batch"),
    ),
    "units in parts": Advice(
        lambda: in_shard_map(
            oc.clip_by(1.0, scope=UNITS()), in_specs=P("data"), out_specs=P("data")
        ),
        "the axes that cut its units or layers, and () where every device holds whole ones",
        lambda: in_shard_map(
            oc.clip_by(1.0, scope=UNITS(), axis_names="data"),
            in_specs=P("data"),
            out_specs=P("data"),
        ),
    ),
    "matrices in parts": Advice(
        lambda: in_shard_map(oc.spectral_clip(1.0), in_specs=P("data"), out_specs=P("data")),
        "spectral_clip(..., axis_names=())",
        lambda: in_shard_map(
            oc.spectral_clip(1.0, axis_names=()), in_specs=P("data"), out_specs=P("data")
        ),
    ),
    "matrices in parts, with specs": Advice(
        lambda: in_shard_map(oc.spectral_clip(1.0), in_specs=P("data"), out_specs=P("data")),
        "spectral_clip(..., specs=...)",
        lambda: in_shard_map(
            oc.spectral_clip(1.0, specs=P("data")), in_specs=P("data"), out_specs=P("data")
        ),
    ),
    # Of examples.
    "a method": Advice(
        lambda: mean_and_norms(method="fast"),
        "'auto', 'ghost', 'microbatch'",
        lambda: [mean_and_norms(method=method) for method in ("auto", "ghost", "microbatch")],
    ),
    "weights": Advice(
        lambda: mean_and_norms(weights=jnp.ones((4, 1))),
        "4 real numbers or booleans, one per example",
        lambda: mean_and_norms(weights=jnp.ones(4)),
    ),
}


@pytest.mark.parametrize("advice", ADVICE.values(), ids=ADVICE.keys())
def test_what_an_error_advises_works(advice):
    with pytest.raises((ValueError, TypeError), match=r".") as error:
        advice.wrong()
    assert advice.says in str(error.value)
    advice.right()


# Whatever takes a threshold, and whatever of gradients is given in its place.
TAKERS = {
    "clip_by": oc.clip_by,
    "at_most": lambda tx: oc.thresholds.at_most(1.0, tx),
    "lag": oc.thresholds.lag,
    "warmup": lambda tx: oc.thresholds.percentile(50.0, warmup=tx),
    "clip": oc.clip,
    "spectral_clip": oc.spectral_clip,
    "larc": oc.larc,
    "skip_spikes": lambda tx: oc.skip_spikes(ADAM, tx),
    "skip_spikes of losses": lambda tx: oc.skip_spikes(ADAM, loss_threshold=tx),
}
OF_GRADIENTS = [
    *(make(1.0) for make in (optax.clip, optax.clip_by_global_norm, optax.clip_by_block_rms)),
    *(make(0.1) for make in (optax.sgd, optax.adamw, optax.lion, optax.adafactor, optax.adagrad)),
    *(optax.sgd(lambda step: 0.1), optax.sgd(0.1, momentum=0.9), optax.contrib.muon(0.1)),
    *(optax.chain(optax.identity(), optax.adaptive_grad_clip(1.0)), oc.zclip(), oc.watch()),
    optax.chain(oc.zclip()),
    *(oc.skip_nonfinite(ADAM), optax.chain(oc.zclip(), ADAM), optax.scale_by_adam()),
]


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_what_is_of_gradients_is_no_threshold(take):
    for tx in OF_GRADIENTS:
        with pytest.raises(ValueError, match="threshold"):
            take(tx)
    # Of norms: a running mean, and what the user wrote.
    mine = optax.stateless(lambda norms, params: jax.tree.map(lambda n: 0.9 * n, norms))
    for tx in (optax.chain(optax.ema(0.9), optax.scale(2.0)), optax.trace(0.9), mine):
        take(tx)
