"""The programs: a training step, a gradient clipped per example, a scan of small steps."""

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import optaxclip
from tests.benchmarks.accelerators_cases import MODELS, Case, count_local, cut, is_stacked
from tests.benchmarks.accelerators_targets import EVERYWHERE, Placement


class Program(NamedTuple):
    """A function and the shapes that it is compiled for."""

    step: Callable
    arguments: tuple
    parameters: int
    gradients: int  # bytes on one device
    donated: tuple[int, ...] = ()


class Clip(NamedTuple):
    """A row: the optimizer made safe by a clip, and which row of Optax it stands beside."""

    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    beside: str = ""


NONE = "no clip"
GLOBAL, AGC, VALUE = "optax.clip_by_global_norm", "optax.adaptive_grad_clip", "optax.clip"


def _before(name: str, *args: Any, **more: Any) -> Callable:
    """A clip of ours, by name, in front of the optimizer."""
    return lambda inner: optax.chain(getattr(optaxclip, name)(*args, **more), inner)


def _watch(clip: str = "clip_by_global_norm", **more: Any) -> Callable:
    """A watch in front of a clip of ours, and the optimizer."""
    return lambda inner: optax.chain(optaxclip.watch(**more), getattr(optaxclip, clip)(1.0), inner)


CLIPS = {
    NONE: Clip(lambda inner: inner),
    GLOBAL: Clip(lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner)),
    "clip_by_global_norm": Clip(_before("clip_by_global_norm", 1.0), GLOBAL),
    "clip_by_leaf_norm": Clip(_before("clip_by_leaf_norm", 1.0), GLOBAL),
    "clip_by_group_norm": Clip(_before("clip_by_group_norm", 1.0), GLOBAL),
    "zclip": Clip(_before("zclip"), GLOBAL),
    "autoclip": Clip(_before("autoclip"), GLOBAL),
    "quantile_clip": Clip(_before("quantile_clip"), GLOBAL),
    "clip_by_median": Clip(_before("clip_by_median"), GLOBAL),
    "adagc": Clip(_before("adagc"), GLOBAL),
    "skip_spikes": Clip(lambda inner: optaxclip.skip_spikes(inner), GLOBAL),
    "watch": Clip(_watch(), GLOBAL),
    "watch, by leaf": Clip(_watch("clip_by_leaf_norm"), GLOBAL),
    "watch, histogram": Clip(_watch(histogram=True), GLOBAL),
    AGC: Clip(lambda inner: optax.chain(optax.adaptive_grad_clip(0.01), inner)),
    "adaptive_grad_clip": Clip(_before("adaptive_grad_clip", 0.01), AGC),
    VALUE: Clip(lambda inner: optax.chain(optax.clip(1.0), inner)),
    "clip": Clip(_before("clip", 1.0), NONE),
    "clip_by_leaf_norm, stacked": Clip(
        _before("clip_by_leaf_norm", 1.0, stacked="^(h|layers)/"), GLOBAL
    ),
    "clip_by_group_norm, stacked": Clip(
        _before("clip_by_group_norm", 1.0, stacked="^(h|layers)/"), GLOBAL
    ),
}
# Layers stacked for a scan: a unit lies along the last axis but one, which Optax has to be told.
STACKED = {
    AGC: Clip(lambda inner: optax.chain(optax.adaptive_grad_clip(0.01, axis=-2), inner)),
    "adaptive_grad_clip": Clip(_before("adaptive_grad_clip", 0.01, 1e-3, -2), AGC),
}


def build(case: Case, name: str, placement: Placement) -> Program:
    """The program of one row of a case."""
    if case.suite == "examples":
        return _differentiate_examples(name, placement)
    if case.suite == "scan":
        return _scan(CLIPS[name], "seeds" in case.model, placement)
    clip = STACKED.get(name, CLIPS[name]) if is_stacked(case.model) else CLIPS[name]
    return _train(case, clip, placement)


def _train(case: Case, clip: Clip, placement: Placement) -> Program:
    """One step of a clip and AdamW; parameters and state are donated."""
    shapes, mesh = MODELS[case.model](), placement.mesh
    sizes = dict(mesh.shape) if mesh else {}
    devices = math.prod(sizes.values())
    specs = {k: cut(k, s, case.form, devices) if mesh else EVERYWHERE for k, s in shapes.items()}
    params, grads = (
        {k: _shape(s, kind, placement, specs[k]) for k, s in shapes.items()}
        for kind in (case.params, case.grads)
    )
    # Optax's clips know no `shard_map`: they stand beside ours as plain jit has them.
    mapped = case.form == "shard_map" and bool(clip.beside)
    tx = clip.wrap(optax.adamw(1e-3))
    # Where axes are Explicit, `init` needs the mesh in its context to cut the norms of units.
    explicit = case.form == "explicit"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if explicit else nullcontext():
        state = jax.eval_shape(tx.init, params)
    state, state_specs = _place(state, specs, placement)
    step = _step(tx)
    if mapped:
        ins = (specs, state_specs, specs)
        step = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=ins[:2])
    count = sum(map(math.prod, shapes.values()))
    local = sum(count_local(s, specs[k], sizes) for k, s in shapes.items())
    return Program(
        step, (params, state, grads), count, local * jnp.dtype(case.grads).itemsize, (0, 1)
    )


def _step(tx: optax.GradientTransformation) -> Callable:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _shape(shape, kind, placement: Placement, spec: P = EVERYWHERE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, kind, sharding=placement.shard(spec))


def _place(state: Any, specs: dict[str, P], placement: Placement) -> tuple[Any, Any]:
    """A state and its specs: what is like the parameters lies as they do, all else everywhere.

    Under Explicit axes all lies as its type says.
    """

    def spec_of(leaves: Any) -> Any:
        if getattr(leaves, "sharding", None):
            return leaves.sharding.spec
        if not isinstance(leaves, dict) or leaves.keys() != specs.keys():
            return jax.tree.map(lambda x: EVERYWHERE, leaves)
        # A statistic of a leaf is filed under its name, and has no axes to cut.
        return {k: specs[k] if len(specs[k]) <= x.ndim else EVERYWHERE for k, x in leaves.items()}

    is_like_params = lambda x: isinstance(x, dict) and x.keys() == specs.keys()  # noqa: E731
    found = jax.tree.map(spec_of, state, is_leaf=is_like_params)
    placed = jax.tree.map(lambda x, spec: _shape(x.shape, x.dtype, placement, spec), state, found)
    return placed, found


BATCH, LENGTH, WIDTH, HEADS = 32, 128, 512, 8
CPU = ", CPU"  # what names of rows end in that stand for the CPU
PLAIN, MAPPED, OURS = "gradient", "vmap(grad), optax clip", "clipped_value_and_grad"


def _attend(params: dict, x: jax.Array) -> jax.Array:
    """A transformer block on one example."""
    q, k, v = jnp.split(_normalize(x) @ params["qkv"] + params["qkv_bias"], 3, axis=-1)
    q, k, v = (y.reshape(LENGTH, HEADS, -1).swapaxes(0, 1) for y in (q, k, v))
    scores = jax.nn.softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
    x = x + (scores @ v).swapaxes(0, 1).reshape(LENGTH, WIDTH) @ params["out"]
    return x + jax.nn.gelu(_normalize(x) @ params["up"] + params["up_bias"]) @ params["down"]


def _normalize(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def _differentiate_examples(name: str, placement: Placement) -> Program:
    """The gradient of a batch: clipped per example in Optax's way or in ours, or not at all."""
    step = {PLAIN: _sum_gradients, MAPPED: _map_gradients, OURS: _clip_gradients}[name]
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH)}
    shapes |= {"down": (4 * WIDTH, WIDTH), "qkv_bias": (3 * WIDTH,), "up_bias": (4 * WIDTH,)}
    params = {k: _shape(s, jnp.float32, placement) for k, s in shapes.items()}
    batch = (_shape((BATCH, LENGTH, WIDTH), jnp.float32, placement),) * 2
    count = sum(map(math.prod, shapes.values()))
    return Program(step, (params, batch), count, 4 * count)


def _loss(params: dict, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(_attend(params, example[0]) - example[1]))


def _sum_gradients(params: dict, batch: tuple) -> dict:
    return jax.grad(lambda p: jnp.sum(jax.vmap(_loss, (None, 0))(p, batch)))(params)


def _map_gradients(params: dict, batch: tuple) -> dict:
    grads = jax.vmap(jax.grad(_loss), (None, 0))(params, batch)
    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten(optax.per_example_global_norm_clip(leaves, 1.0)[0])


def _clip_gradients(params: dict, batch: tuple) -> dict:
    return optaxclip.clipped_value_and_grad(_loss, 1.0, reduce="sum")(params, batch)[1]


def _scan(clip: Clip, seeds: bool, placement: Placement) -> Program:
    """A thousand steps of a small network, as in reinforcement learning, or of 64 of them."""
    widths = (8, 256, 256, 256, 4)
    shapes = {f"{i}/kernel": s for i, s in enumerate(itertools.pairwise(widths))}
    shapes |= {f"{i}/bias": (width,) for i, width in enumerate(widths[1:])}
    tx = clip.wrap(optax.adam(3e-4))

    def loss(params, x):
        for i in range(len(widths) - 1):
            x = jnp.tanh(x @ params[f"{i}/kernel"] + params[f"{i}/bias"])
        return jnp.mean(jnp.square(x))

    def step(carry, x):
        updates, state = tx.update(jax.grad(loss)(carry[0], x), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    def train(params, state, batches):
        return jax.lax.scan(step, (params, state), batches)[0]

    lead, run = ((64,), jax.vmap(train)) if seeds else ((), train)
    state = jax.eval_shape(
        tx.init, {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    )
    params = {k: _shape((*lead, *s), jnp.float32, placement) for k, s in shapes.items()}
    state = jax.tree.map(lambda x: _shape((*lead, *x.shape), x.dtype, placement), state)
    batches = _shape((*lead, 1000, 64, widths[0]), jnp.float32, placement)
    count = math.prod(lead) * sum(map(math.prod, shapes.values()))
    return Program(run, (params, state, batches), count, 4 * count, (0, 1))
