"""What a clip costs beside its arithmetic: calls without jit, compilation, percentiles."""

import functools
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
    """New norms in a window, and its percentile after each, beside `jnp.percentile` of the window.

    In a `lax.scan`: a call by itself costs more than to sort a thousand numbers.
    """
    rows = []
    for blocks, window in (
        ((1, 50), (3, 50)) if small else ((1, 1000), (1, 10_000), (150, 1000), (150, 10_000))
    ):
        norms = jax.random.uniform(jax.random.key(0), (window, blocks))
        rows.append(
            [str(blocks), f"{window:,}", quartiles(_percentile_ratios(norms, 3 if small else 15))]
        )
    return table(["blocks", "window", "times faster than jnp.percentile"], rows)


def _percentile_ratios(norms: jax.Array, rounds: int, steps: int = 50) -> np.ndarray:
    window, blocks = norms.shape
    threshold = optaxclip.thresholds.percentile(10.0, window=window)

    def learn(state, norm):
        bound, state = threshold.update(norm, state)
        return state, bound

    def sort_again(state, norm):
        ring, seen = state
        ring = ring.at[seen % window].set(norm)
        return (ring, seen + 1), jnp.percentile(ring, 10.0, axis=0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(step, state, norms):
        return jax.lax.scan(step, state, norms)

    full, _ = run(learn, threshold.init(jnp.zeros(blocks)), norms)
    new = norms[:steps]
    runs = {
        "jnp.percentile": lambda: run(sort_again, (norms, 0), new)[1],
        "ours": lambda: run(learn, full, new)[1],
    }
    times = race(runs, rounds)
    return times["jnp.percentile"] / times["ours"]
