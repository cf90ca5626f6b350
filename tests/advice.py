"""Errors that say what to write: each with a call that raises it, and the corrected call."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip.compat import write_to_varying

GRADS = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
ADAM = optax.adam(1e-3)


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
    """Two updates, traced; gradients and parameters are concrete in the first."""

    def first():
        return tx.update(grads, tx.init(params), params, **more)[1]

    return jax.eval_shape(tx.update, grads, jax.eval_shape(first), params, **more)


def state_of(tx):
    return tx.update(GRADS, tx.init(GRADS), GRADS)[1]


def runs_of(tx):
    """The state of three runs."""
    return jax.vmap(lambda factor: tx.init(jax.tree.map(lambda g: factor * g, GRADS)))(jnp.ones(3))


def in_shard_map(tx, change=lambda grads: grads, **options):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def clip(params):
        return tx.update(change(params), tx.init(params), params)[0]

    options = {"in_specs": P(), "out_specs": P(), **options}
    return jax.eval_shape(jax.shard_map(clip, mesh=mesh, **options), jnp.ones((4, 2)))


def clip_layers_in_parts(**over):
    tx = oc.clip_by(1.0, scope=oc.scopes.stacked("", **over), axis_names=())
    return in_shard_map(tx, in_specs=P("data"), out_specs=P("data"))


def in_pmap(tx, **options):
    def clip(grads):
        return tx.update(grads, tx.init(grads))[0]

    return jax.pmap(clip, devices=jax.devices()[:2], **options)(jnp.ones((2, 3)))


class Model(eqx.Module):
    weight: jax.Array
    activation: Callable = jax.nn.relu


MODEL = Model(jnp.ones(3))
KEYED = {"key": jax.random.key(0), "w": jnp.ones(2)}
FILTERED = eqx.filter(MODEL, eqx.is_inexact_array)
FULL = {"check_vma": False}
SHARE = oc.thresholds.param_relative
UNITS = oc.scopes.units


def loss(params, example, mode=None):
    return jnp.sum((params["w"] @ example) ** 2)


PARAMS, BATCH = {"w": jnp.ones((3, 2))}, jnp.ones((4, 2))


def mean_and_norms(loss=loss, *, params=PARAMS, batch=BATCH, shared=(), weights=None, **options):
    step = oc.clipped_value_and_grad(loss, 1.0, **options)
    return jax.eval_shape(lambda: step(params, batch, *shared, weights=weights))


def of_clients(tx):
    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    return jax.eval_shape(jax.vmap(update, axis_name="clients"), jnp.ones((3, 2)))


MEAN = oc.aggregation.clipped_mean(oc.clip_by_global_norm(1.0), "data")


def cast(params):
    """As the errors of aggregations write it."""
    return eval(write_to_varying("params", ("data",)))


def accumulated(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


def recorded(tx=None):
    """A history of a step."""
    history = oc.History()
    history.append(oc.metrics(state_of(oc.zclip() if tx is None else tx)))
    return history


def group_by(users):
    return oc.per_example.group_by_user(BATCH, users, max_examples=2)


ADVICE = {
    # Calling a clip by hand.
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
    "random keys": Advice(
        lambda: run(oc.skip_nonfinite(ADAM), KEYED, KEYED),
        "leave the others out: optax.masked(skip_nonfinite(...), mask)",
        lambda: run(optax.masked(oc.skip_nonfinite(ADAM), {"w": True, "key": False}), KEYED, KEYED),
    ),
    "a placeholder": Advice(
        lambda: optax.tree.map_params(oc.adagc(), lambda x: x, oc.adagc().init(GRADS)),
        "jax.eval_shape(tx.init, params)",
        lambda: (
            jax.eval_shape((tx := oc.adagc()).init, GRADS),
            optax.tree.map_params(tx, lambda x: x, oc.adagc().init(GRADS)),
        ),
    ),
    "parameters of a view": Advice(
        lambda: oc.clippy().update(GRADS, oc.clippy().init(GRADS)),
        "write tx.update(grads, state, params)",
        lambda: run(oc.clippy()),
    ),
    "a state of a model": Advice(
        lambda: oc.zclip().update(FILTERED, oc.clip_by(1.0).init(FILTERED)),
        "For an Equinox model initialise with eqx.filter(model, eqx.is_inexact_array)",
        lambda: run(oc.zclip(), FILTERED, FILTERED),
    ),
    # Parts.
    "bounds for blocks": Advice(
        lambda: run(oc.clip_by(jnp.ones(3), scope=oc.scopes.leaf)),
        "one number, or one number per block",
        lambda: [run(oc.clip_by(x, scope=oc.scopes.leaf)) for x in (1.0, jnp.ones(2))],
    ),
    "a flag": Advice(
        lambda: oc.autoclip(update_first=1),
        "True or False",
        lambda: [run(oc.autoclip(window=2, update_first=x)) for x in (True, False)],
    ),
    "a number": Advice(
        lambda: oc.clip_by_global_norm(-1.0),
        "a number from 0 to inf, an array of such numbers, a schedule (a function of the step) or a"
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
        "an array of such numbers, a schedule (a function of the step) or a threshold",
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
    "a feed that was called": Advice(
        lambda: oc.feeds.raw(100),
        "write feeds.raw, without parentheses",
        lambda: run(oc.clip_by(oc.thresholds.running(feed=oc.feeds.raw))),
    ),
    "a list": Advice(
        lambda: oc.clip_by([1.0, 2.0], scope=oc.scopes.leaf),
        "an array of such numbers, a schedule (a function of the step) or a threshold (an optax"
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
    "a view that is none": Advice(
        lambda: oc.clip_by(1.0, view=1.0),
        "a function (leaf, parameters) -> array, or None",
        lambda: [run(oc.clip_by(1.0, view=x)) for x in (None, lambda leaf, w: leaf / (1 + w))],
    ),
    "axes that are none": Advice(
        lambda: run(oc.clip_by(1.0, scope=UNITS("0"))),
        "Pass an axis, a tuple of axes, ... for all of them, or a function of the path",
        lambda: [run(oc.clip_by(1.0, scope=UNITS(x))) for x in (0, (0,), ..., lambda path: 0)],
    ),
    # Wrappers.
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
    # Reading a state or a run.
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
    # Several devices.
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
    "layers in parts": Advice(
        lambda: clip_layers_in_parts(),
        "scopes.stacked(..., over=...) with the axes over which layers are cut, or over=() if each",
        lambda: [clip_layers_in_parts(over=axes) for axes in ("data", ())],
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
    # Clipping per example.
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
    "no example": Advice(
        lambda: mean_and_norms(batch=jnp.ones((0, 2))),
        "pad it to a fixed size and pass weights=, 0 for the padding",
        lambda: mean_and_norms(batch=jnp.zeros((3, 2)), weights=jnp.zeros(3)),
    ),
    "no array": Advice(
        lambda: mean_and_norms(shared=["train"]),
        "functools.partial(loss, mode='train')",
        lambda: mean_and_norms(functools.partial(loss, mode="train")),
    ),
    "parameters that are whole numbers": Advice(
        lambda: mean_and_norms(params={"w": jnp.ones((3, 2)), "n": 1}),
        "pass it after batch: value_and_grad(params, batch, shared)",
        lambda: mean_and_norms(lambda params, example, n: loss(params, example), shared=[1]),
    ),
    "parts of different sizes": Advice(
        lambda: mean_and_norms(batch=(jnp.ones((4, 2)), jnp.ones(3))),
        "Pass whatever all examples share after batch: value_and_grad(params, batch, shared)",
        lambda: mean_and_norms(
            lambda params, example, shared: loss(params, example), shared=[jnp.ones(3)]
        ),
    ),
    "BatchNorm": Advice(
        lambda: mean_and_norms(lambda p, x: (loss(p, x), {"batch_stats": x}), has_aux=True),
        "or BatchNorm with fixed statistics, passed after batch",
        lambda: mean_and_norms(lambda p, x, mean: loss(p, x - mean), shared=[jnp.ones(2)]),
    ),
    "a pair": Advice(
        lambda: mean_and_norms(lambda p, x: (loss(p, x), x)),
        "for a pair (loss, aux) pass has_aux=True",
        lambda: mean_and_norms(lambda p, x: (loss(p, x), x), has_aux=True),
    ),
    "no pair": Advice(
        lambda: mean_and_norms(has_aux=True),
        "must return a pair (loss, aux) with has_aux=True",
        lambda: mean_and_norms(lambda p, x: (loss(p, x), x), has_aux=True),
    ),
    "several losses": Advice(
        lambda: mean_and_norms(lambda p, x: {"a": loss(p, x), "b": loss(p, x)}),
        "add the losses up, and return them separately as aux, with has_aux=True",
        lambda: mean_and_norms(lambda p, x: (2 * loss(p, x), {"a": loss(p, x)}), has_aux=True),
    ),
    "a loss for each output": Advice(
        lambda: mean_and_norms(lambda p, x: p["w"] @ x),
        "must sum or average the rest",
        lambda: mean_and_norms(lambda p, x: jnp.mean(p["w"] @ x)),
    ),
    "units of examples": Advice(
        lambda: mean_and_norms(scope=UNITS()),
        "scope must be scopes.tree, scopes.leaf or scopes.groups(...)",
        lambda: [
            mean_and_norms(scope=scope)
            for scope in (oc.scopes.tree, oc.scopes.leaf, oc.scopes.groups())
        ],
    ),
    # Clients.
    "no clients": Advice(
        lambda: run(oc.aggregation.clipped_mean(oc.clip_by_global_norm(1.0), "clients")),
        "inside jax.vmap(..., axis_name=...)",
        lambda: of_clients(oc.aggregation.clipped_mean(oc.clip_by_global_norm(1.0), "clients")),
    ),
    "clients of one gradient": Advice(
        lambda: in_shard_map(MEAN),
        write_to_varying("params", ("data",)),
        lambda: in_shard_map(MEAN, cast),
    ),
    "micro-batches around clients": Advice(
        lambda: in_shard_map(accumulated(MEAN), cast),
        "write optax.chain(aggregation, optax.MultiSteps(...))",
        lambda: in_shard_map(optax.chain(MEAN, accumulated(ADAM)), cast),
    ),
    "an axis that is none": Advice(
        lambda: oc.aggregation.clipped_mean(oc.zclip(), 0),
        'the axis of clients, such as "clients", or a tuple of axes',
        lambda: [oc.aggregation.clipped_mean(oc.zclip(), axis) for axis in ("clients", ("a", "b"))],
    ),
    "a threshold for a clip": Advice(
        lambda: oc.aggregation.clipped_mean(oc.thresholds.zscore(), "clients"),
        "such as clip_by_global_norm(1.0)",
        lambda: oc.aggregation.clipped_mean(oc.clip_by_global_norm(1.0), "clients"),
    ),
    # More parts.
    "a share without parameters": Advice(
        lambda: oc.clip_by(SHARE(0.1)).update(GRADS, oc.clip_by(SHARE(0.1)).init(GRADS)),
        "write tx.update(grads, state, params)",
        lambda: run(oc.clip_by(SHARE(0.1))),
    ),
    "a factor that can only fall": Advice(
        lambda: oc.thresholds.running(0.9),
        "(or use feeds.raw)",
        lambda: run(oc.clip_by(oc.thresholds.running(0.9, feed=oc.feeds.raw))),
    ),
    "names without blocks": Advice(
        lambda: run(oc.clip_by(oc.thresholds.by_name({"b": 1.0}))),
        "use scopes.leaf, scopes.groups(...) or scopes.stacked(...)",
        lambda: [
            run(oc.clip_by(oc.thresholds.by_name(dict.fromkeys(names, 1.0)), scope=scope))
            for names, scope in (
                ("bw", oc.scopes.leaf),
                ("bw", oc.scopes.groups(lambda path: path)),
                ("bw", oc.scopes.stacked("w")),
            )
        ],
    ),
    "other blocks": Advice(
        lambda: oc.clip_by_leaf_norm(1.0).update(GRADS, oc.clip_by_leaf_norm(1.0).init({"b": 1.0})),
        "Initialise with the tree that is updated",
        lambda: run(oc.clip_by_leaf_norm(1.0)),
    ),
    "groups that overlap": Advice(
        lambda: run(oc.clip_by_group_norm(1.0, {"b": "one"})),
        "Add or narrow patterns, or exclude= the leaves",
        lambda: [
            run(oc.clip_by_group_norm(1.0, {"b": "one", "w": "other"})),
            run(oc.clip_by_group_norm(1.0, {"b": "one"}, exclude="w")),
        ],
    ),
    "stacks of several lengths": Advice(
        lambda: oc.clip_by_group_norm(1.0, lambda path: "all", stacked="").init(GRADS),
        "give them labels of their own",
        lambda: oc.clip_by_group_norm(1.0, lambda path: path, stacked="").init(GRADS),
    ),
    "an action": Advice(
        lambda: oc.clip_by(1.0, action=2.0),
        "actions.rescale, actions.normalize, actions.zero, actions.smooth(p), actions.band(low) or"
        " a function (norms, bounds) -> factors",
        lambda: [
            run(oc.clip_by(1.0, action=action))
            for action in (
                *(oc.actions.rescale, oc.actions.normalize, oc.actions.zero),
                *(oc.actions.smooth(2.0), oc.actions.band(0.1), lambda n, b: jnp.ones_like(n)),
            )
        ],
    ),
    "a feed": Advice(
        lambda: oc.thresholds.running(feed="raw"),
        "feeds.raw, feeds.clipped, feeds.accepted or a function (norms, bounds) -> norms",
        lambda: [
            run(oc.clip_by(oc.thresholds.running(feed=feed)))
            for feed in (oc.feeds.raw, oc.feeds.clipped, oc.feeds.accepted, lambda n, b: n)
        ],
    ),
    "a norm": Advice(
        lambda: oc.clip_by(1.0, norm="l2"),
        "norms.l2, norms.l1, norms.linf, norms.rms, or a number p from 1 to inf",
        lambda: [
            run(oc.clip_by(1.0, norm=norm))
            for norm in (oc.norms.l2, oc.norms.l1, oc.norms.linf, oc.norms.rms, 1, 1.5, jnp.inf)
        ],
    ),
    "what to exclude": Advice(
        lambda: oc.clip_by(1.0, exclude=["b"]),
        "a regular expression (str), a predicate of the path, or None",
        lambda: [run(oc.clip_by(1.0, exclude=x)) for x in ("b", lambda path: path == "b", None)],
    ),
    "axes in parentheses": Advice(
        lambda: in_shard_map(oc.zclip(axis_names=1), **FULL),
        "one axis name or tuple of names, a function of the path, or a tree with one such entry",
        lambda: [
            in_shard_map(oc.zclip(axis_names=names), **FULL)
            for names in ("data", ("data",), lambda path: "data", ["data"])
        ],
    ),
    "axes outside of a mesh": Advice(
        lambda: run(oc.zclip(axis_names="data")),
        "Under plain jit leave axis_names= out",
        lambda: run(oc.zclip()),
    ),
    "axes of matrices": Advice(
        lambda: oc.spectral_clip(1.0, axis_names="data"),
        "axis_names must be () or None",
        lambda: [run(oc.spectral_clip(1.0, axis_names=names)) for names in ((), None)],
    ),
    "cuts of matrices": Advice(
        lambda: run(oc.spectral_clip(1.0, specs="data")),
        "a PartitionSpec, a function of the path, or a tree of PartitionSpecs",
        lambda: [
            run(oc.spectral_clip(1.0, specs=specs))
            for specs in (P(), lambda path: P(), {"b": P(), "w": P()})
        ],
    ),
    "a threshold in a warm-up": Advice(
        lambda: oc.wrappers.spectra(ADAM, lambda step: 0.1, oc.thresholds.zscore(), warmup_steps=2),
        "a number or a schedule if there are warmup_steps",
        lambda: (
            [
                run(oc.wrappers.spectra(ADAM, lambda step: 0.1, bound, warmup_steps=2))
                for bound in (1.0, lambda step: 1.0)
            ]
            + [run(oc.wrappers.spectra(ADAM, lambda step: 0.1, oc.thresholds.zscore()))]
        ),
    ),
    "heads elsewhere": Advice(
        lambda: oc.clip_qk(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones(2)),
        "pass head_axis=",
        lambda: oc.clip_qk(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones(2), head_axis=0),
    ),
    # More wrappers.
    "zeros for parameters": Advice(
        lambda: oc.wrappers.clip_params(oc.clip_by(1.0, nonfinite="zero")),
        "Leave it out, and wrap the optimizer in skip_nonfinite",
        lambda: run(oc.skip_nonfinite(optax.chain(ADAM, oc.wrappers.clip_params(oc.clip_by(1.0))))),
    ),
    "no clip of parameters": Advice(
        lambda: oc.wrappers.clip_params(1.0),
        "such as clip_by_leaf_norm(1.0)",
        lambda: run(optax.chain(ADAM, oc.wrappers.clip_params(oc.clip_by_leaf_norm(1.0)))),
    ),
    "no second moment": Advice(
        lambda: run(oc.scale_by_stable_rms(optax.trace(0.9))),
        "wrap optax.scale_by_adam()",
        lambda: run(oc.scale_by_stable_rms(optax.scale_by_adam())),
    ),
    "nothing to report": Advice(
        lambda: oc.report(ADAM).init(GRADS),
        "write report(optax.chain(optaxclip.watch(), optimizer))",
        lambda: oc.report(optax.chain(oc.watch(), ADAM)).init(GRADS),
    ),
    "nobody to report to": Advice(
        lambda: oc.report(oc.zclip(), 1),
        "a function of (step, row), or a History",
        lambda: [oc.report(oc.zclip(), to) for to in (lambda step, row: None, oc.History())],
    ),
    "candidates": Advice(
        lambda: oc.watch(candidates=1.0),
        "a dict of name -> threshold, or a list of numbers",
        lambda: [
            run(oc.watch(candidates=candidates))
            for candidates in ({"a": oc.thresholds.zscore()}, [1.0, 2.0])
        ],
    ),
    "a tag in words": Advice(
        lambda: run(oc.watch(), tag="batch 3"),
        "one integer, such as the number of the batch",
        lambda: run(oc.watch(), tag=3),
    ),
    # What is recorded.
    "one step": Advice(
        lambda: oc.diagnose({"clip/grad_norm": 1.0}),
        "a History, to which history.append(optaxclip.metrics(opt_state)) adds each, or a list of"
        " such dicts",
        lambda: [oc.diagnose(history) for history in (recorded(), [{"clip/grad_norm": 1.0}])],
    ),
    "logarithms of norms": Advice(
        lambda: oc.diagnose({"grad_norm": [-2.0, 1.0]}),
        "pass the norms themselves, not their logarithms",
        lambda: oc.diagnose({"grad_norm": [0.01, 10.0]}),
    ),
    "a column of text": Advice(
        lambda: oc.diagnose([{"grad_norm": "1.0", "phase": "warm-up"}]),
        "a history is of numbers only, so leave this key out",
        lambda: oc.diagnose([{"grad_norm": "1.0"}]),
    ),
    "axes of layers that are numbers": Advice(
        lambda: oc.scopes.stacked("w", over=0),
        "over must be mesh axes: a name, a tuple of names or a function of the path",
        lambda: [oc.scopes.stacked("w", over=x) for x in ("x", ("x", "y"), lambda path: ("x",))],
    ),
    "no history": Advice(
        lambda: oc.diagnose(1.0),
        "an optaxclip.History, a dict with an array under each key, or a list with a dict for each"
        " step",
        lambda: [
            oc.diagnose(history)
            for history in (
                *(recorded(), {"clip/grad_norm": np.ones(3)}, [{"clip/grad_norm": 1.0}]),
            )
        ],
    ),
    "norms that are a state": Advice(
        lambda: oc.recommend(state_of(oc.zclip())),
        "history.append(optaxclip.metrics(opt_state)), and pass the history",
        lambda: oc.recommend(recorded()),
    ),
    "no norms": Advice(
        lambda: oc.recommend({"loss": np.ones(3)}),
        "or pass norms of the shape (steps,) or (steps, layers), or a dict of layer -> norms",
        lambda: [
            oc.recommend(norms)
            for norms in (recorded(), np.ones(9), np.ones((9, 2)), {"a": np.ones(9)})
        ],
    ),
    "nothing to plot": Advice(
        lambda: oc.plots.plot_norms({"loss": np.ones(3)}),
        "pass it measure=True, or put optaxclip.watch() before it",
        lambda: [
            oc.plots.plot_norms(recorded(tx))
            for tx in (oc.clip(1.0, measure=True), optax.chain(oc.watch(), oc.clip(1.0)))
        ],
    ),
    "no layers to plot": Advice(
        lambda: oc.plots.plot_layers(recorded(oc.zclip())),
        "put optaxclip.watch() before the clip, or clip with scope=scopes.leaf or by group",
        lambda: [
            oc.plots.plot_layers(recorded(tx))
            for tx in (
                optax.chain(oc.watch(), oc.zclip()),
                oc.zclip(scope=oc.scopes.leaf),
                oc.clip_by_group_norm(1.0, lambda path: path),
            )
        ],
    ),
    "numbers of users of 64 bits": Advice(
        lambda: group_by(2**40 + np.arange(4)),
        "write np.unique(users, return_inverse=True)[1]",
        lambda: group_by(np.unique(2**40 + np.arange(4), return_inverse=True)[1]),
    ),
}
