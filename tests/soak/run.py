"""Ways to run a clip: op by op, as one program, and on meshes. All must give the same numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.soak.parts import SHAPES, SPECS, Composition, make

Steps = tuple[list[Any], list[Any]]
AXES = ("x", "y")


def run(parts: Composition, grads: list[Any]) -> Steps:
    """Updates and states after each step, as NumPy's."""
    way = {"op by op": run_eagerly, "jit": run_jitted, "vmap": run_mapped}
    return way.get(parts.mesh, run_on_mesh)(parts, grads)


def ones_like(grads: Any) -> Any:
    return jax.tree.map(np.ones_like, grads)


def run_eagerly(parts: Composition, grads: list[Any]) -> Steps:
    return step_by_step(make(parts), grads)


def step_by_step(tx, grads: list[Any]) -> Steps:
    """A state that changed its shapes or dtypes could not be carried through a loop."""
    params = jax.tree.map(jnp.asarray, ones_like(grads[0]))
    state, seen = tx.init(params), []
    types = kinds_of(state)
    for now in grads:
        updates, state = tx.update(jax.tree.map(jnp.asarray, now), state, params)
        assert kinds_of(state) == types
        seen.append((updates, state))
    updates, states = zip(*jax.device_get(seen), strict=True)
    return list(updates), list(states)


def kinds_of(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(x.shape, x.dtype) for x in leaves]


def scan(tx, grads: Any, params: Any, first: int = 0):
    """Updates and states of all steps; the first ones before the loop."""
    state, seen = tx.init(params), []

    def step(state, now):
        updates, state = tx.update(now, state, params)
        return state, (updates, state)

    for i in range(first):
        state, out = step(state, at(grads, i))
        seen.append(jax.tree.map(lambda x: x[None], out))
    seen.append(jax.lax.scan(step, state, jax.tree.map(lambda g: g[first:], grads))[1])
    return jax.tree.map(lambda *x: jnp.concatenate(x), *seen) if first else seen[0]


def stack(grads: list[Any]) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *grads)


def unstack(seen: Any, steps: int) -> Steps:
    updates, states = jax.device_get(seen)
    return [at(updates, i) for i in range(steps)], [at(states, i) for i in range(steps)]


def at(tree: Any, step: int) -> Any:
    return jax.tree.map(lambda x: x[step], tree)


def run_jitted(parts: Composition, grads: list[Any]) -> Steps:
    seen = jax.jit(functools.partial(scan, make(parts)))(stack(grads), ones_like(grads[0]))
    return unstack(seen, len(grads))


def cut(grads: Any) -> Any:
    """Each leaf in two parts along its first axis that is even, or whole on both."""

    def halves(x):
        return np.stack(np.split(x, 2) if x.ndim and x.shape[0] == 2 else [x, x])

    return jax.tree.map(halves, grads)


def run_mapped(parts: Composition, grads: list[Any]) -> Steps:
    """On two devices of a `vmap` with an axis name."""
    names = {path: "x" if shape[:1] == (2,) else () for path, shape in SHAPES.items()}
    tx = make(parts, axis_names=names.get)
    params = cut(ones_like(grads[0]))
    state = jax.vmap(tx.init, axis_name="x")(params)
    update = jax.vmap(tx.update, axis_name="x")
    updates, states = [], []
    for now in grads:
        out, state = update(cut(now), state, params)
        whole = jax.tree.map(
            lambda x, g: np.concatenate(x) if g.ndim and g.shape[0] == 2 else np.asarray(x[0]),
            jax.device_get(out),
            now,
        )
        updates.append(whole)
        states.append(jax.tree.map(lambda x: np.asarray(x[0]), state))
    return updates, states


@functools.cache
def mesh_of(kind: AxisType):
    return jax.make_mesh((2, 4), AXES, axis_types=(kind,) * 2)


def specs_of(grads: Any, *before) -> Any:
    """How each leaf lies, with axes before its own."""
    return {
        path: jax.tree.map(lambda _, path=path: P(*before, *SPECS.get(path, P())), g)
        for path, g in grads.items()
    }


def put(grads: Any, mesh, specs: Any) -> Any:
    return jax.tree.map(lambda g, s: jax.device_put(g, NamedSharding(mesh, s)), grads, specs)


def run_on_mesh(parts: Composition, grads: list[Any]) -> Steps:
    explicit = parts.mesh == "explicit"
    mesh = mesh_of(AxisType.Explicit if explicit else AxisType.Auto)
    here, all_steps = specs_of(grads[0]), specs_of(grads[0], None)
    params, stacked = ones_like(grads[0]), stack(grads)
    if parts.mesh in ("sharded", "explicit"):
        with jax.set_mesh(mesh):
            whole = put(params, mesh, here), put(stacked, mesh, all_steps)
            seen = jax.jit(lambda p, g: scan(make(parts), g, p))(*whole)
            return unstack(seen, len(grads))
    silent, names = parts.mesh == "shard_map without types", None
    if silent:
        names = {path: tuple(n for n in spec if n) for path, spec in SPECS.items()}.get
    tx = make(parts, axis_names=names)
    mapped = jax.shard_map(
        lambda p, g: scan(tx, g, p, first=1),
        mesh=mesh,
        in_specs=(here, all_steps),
        out_specs=(all_steps, state_specs(tx, params, all_steps)),
        check_vma=not silent,
    )
    return unstack(jax.jit(mapped)(params, stacked), len(grads))


def state_specs(tx, params: Any, specs: Any) -> Any:
    """Of a state: what mirrors the parameters lies as they do."""
    state = jax.eval_shape(tx.init, params)
    mirrors = jax.tree.structure(params)

    def spec(node):
        return specs if jax.tree.structure(node) == mirrors else jax.tree.map(lambda _: P(), node)

    return jax.tree.map(spec, state, is_leaf=lambda x: jax.tree.structure(x) == mirrors)
