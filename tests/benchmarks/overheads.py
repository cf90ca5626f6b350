"""What a clip costs beside its arithmetic: calls without jit, compilation, percentiles."""

import math
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks.reporting import quartiles, race, table
from tests.benchmarks.trees import numbers, shapes_of, small_leaves


def eager(small: bool) -> str:
    """Called without jit."""
    rows = []
    for count in (10, 100) if small else (10, 100, 500):
        grads = numbers({f"leaf{i}": (100 + i % 20,) for i in range(count)})
        runs = {}
        for name, make in (
            ("Optax", optax.clip_by_global_norm),
            ("ours", optaxclip.clip_by_global_norm),
        ):
            tx = make(1.0)
            state = tx.init(grads)
            runs[name] = lambda tx=tx, state=state, g=grads: tx.update(g, state)[0]
        times = race(runs, 3 if small else 15)
        rows.append([str(count), quartiles(times["Optax"] / times["ours"])])
    return table(["leaves", "times faster than Optax"], rows)


def compiling(small: bool) -> str:
    """Trace and compile, CPU seconds, of trees of many small leaves."""
    clips = {
        "global norm": lambda: optaxclip.clip_by_global_norm(1.0),
        "leaf norm": lambda: optaxclip.clip_by_leaf_norm(1.0),
        "adagc (leaf)": lambda: optaxclip.adagc(),
    }
    rows = []
    for count in (20,) if small else (500, 1000, 2000, 5000):
        cost = {name: _compile_seconds(make(), small_leaves(count)) for name, make in clips.items()}
        theirs = (
            _compile_seconds(optax.clip_by_global_norm(1.0), small_leaves(count))
            if count <= 2000
            else math.nan
        )
        rows.append([str(count), *(f"{s:.1f}" for s in cost.values()), f"{theirs:.1f}"])
    return table(["leaves", *clips, "Optax's global norm"], rows)


def _compile_seconds(tx, tree: dict) -> float:
    grads, before = shapes_of(tree), _cpu_seconds()
    state = jax.eval_shape(tx.init, grads)
    jax.jit(tx.update, donate_argnums=0).lower(grads, state).compile()
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def percentiles(small: bool) -> str:
    """One more norm in a window, and its percentile, beside `jnp.percentile` of the window."""
    rows = []
    for blocks, window in (
        ((1, 50), (3, 50)) if small else ((1, 1000), (1, 10_000), (150, 1000), (150, 10_000))
    ):
        norms = jax.random.uniform(jax.random.key(0), (window, blocks))
        rows.append(
            [str(blocks), f"{window:,}", quartiles(_percentile_ratios(norms, 3 if small else 15))]
        )
    return table(["blocks", "window", "times faster than jnp.percentile"], rows)


def _percentile_ratios(norms: jax.Array, rounds: int) -> np.ndarray:
    window, blocks = norms.shape
    threshold = optaxclip.thresholds.percentile(10.0, window=window)
    update = jax.jit(threshold.update, donate_argnums=1)
    full = jax.jit(
        lambda s: jax.lax.scan(lambda s, n: (threshold.update(n, s)[1], None), s, norms)[0]
    )
    hold = {"state": full(threshold.init(jnp.zeros(blocks))), "ring": norms}

    def ours():
        bound, hold["state"] = update(norms[7], hold["state"])
        return bound

    def sorted_again(norm, ring):
        ring = ring.at[3].set(norm)
        return jnp.percentile(ring, 10.0, axis=0), ring

    jitted = jax.jit(sorted_again, donate_argnums=1)

    def theirs():
        bound, hold["ring"] = jitted(norms[7], hold["ring"])
        return bound

    hold["ring"] = norms + 0
    times = race({"jnp.percentile": theirs, "ours": ours}, rounds)
    return times["jnp.percentile"] / times["ours"]
