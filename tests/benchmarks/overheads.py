"""What a clip costs apart from its arithmetic: eager calls, compilation, percentiles."""

import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks.reporting import format_quartiles, race, table
from tests.benchmarks.trees import draw_numbers, small_leaves, to_structs


def measure_eager(small: bool) -> str:
    """Measures calls without jit, relative to Optax's."""
    makers = {"Optax": optax.clip_by_global_norm, "ours": optaxclip.clip_by_global_norm}
    rows = []
    for count in (10, 100) if small else (10, 100, 500):
        grads = draw_numbers({f"leaf{i}": (100 + i % 20,) for i in range(count)})
        runs = {}
        for name, make in makers.items():
            tx = make(1.0)
            state = tx.init(grads)
            runs[name] = lambda tx=tx, state=state, g=grads: tx.update(g, state)[0]
        times = race(runs, 3 if small else 15)
        rows.append([str(count), format_quartiles(times["Optax"] / times["ours"])])
    return table(["leaves", "times faster than Optax"], rows)


def measure_compilation(small: bool) -> str:
    """Measures the CPU seconds to trace and compile the clip of many small leaves."""
    clips = {
        "global norm": optaxclip.clip_by_global_norm(1.0),
        "leaf norm": optaxclip.clip_by_leaf_norm(1.0),
        "adagc (leaf)": optaxclip.adagc(),
        "Optax's global norm": optax.clip_by_global_norm(1.0),
    }
    rows = []
    for count in (20,) if small else (500, 1000, 2000, 5000):
        # Optax's clip of more leaves compiles for too long.
        shown = [name for name in clips if count <= 2000 or "Optax" not in name]
        seconds = {name: _measure_compile(clips[name], small_leaves(count)) for name in shown}
        cells = [f"{seconds[name]:.1f}" if name in seconds else "–" for name in clips]
        rows.append([str(count), *cells])
    return table(["leaves", *clips], rows)


def _measure_compile(tx, tree: dict) -> float:
    grads, before = to_structs(tree), _read_cpu_seconds()
    state = jax.eval_shape(tx.init, grads)
    jax.jit(tx.update, donate_argnums=0).lower(grads, state).compile()
    return _read_cpu_seconds() - before


def _read_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure_percentiles(small: bool) -> str:
    """Measures the percentile of a window after each new norm, relative to `jnp.percentile`.

    In a `lax.scan`, because a call by itself takes longer than sorting a thousand numbers.
    """
    shapes = ((1, 1000), (1, 10_000), (150, 1000), (150, 10_000))
    rows = []
    for blocks, window in ((1, 50), (3, 50)) if small else shapes:
        norms = jax.random.uniform(jax.random.key(0), (window, blocks))
        ratios = _compare_percentiles(norms, 3 if small else 15)
        rows.append([str(blocks), f"{window:,}", format_quartiles(ratios)])
    return table(["blocks", "window", "times faster than jnp.percentile"], rows)


def _compare_percentiles(norms: jax.Array, rounds: int, steps: int = 50) -> np.ndarray:
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
