"""What a clip costs: XLA's own accounts, and time, beside Optax and beside what the memory allows.

    python -m tests.benchmarks.speed [--only chain alone ...] [--small] [--into docs/performance.md]

Times are ratios between functions that took turns in one process, in an order that is reversed every other round: the
median, and the quartiles.  Bytes and temporaries are XLA's, of the compiled program, and the same at every run.
"""

import argparse
import math
import os
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks import hand_written
from tests.benchmarks.reporting import device, put_into, quartiles, race, ratios, table
from tests.benchmarks.trees import TREES, small_leaves

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "adamw, bfloat16 mu": lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "Nesterov": lambda: optax.sgd(1e-3, 0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "lion": lambda: optax.lion(1e-3),
}
CLIPS = {
    "Optax's global norm": lambda: optax.clip_by_global_norm(1.0),
    "global norm": lambda: optaxclip.clip_by_global_norm(1.0),
    "leaf norm": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "group norm": lambda: optaxclip.clip_by_group_norm(1.0),
    "block RMS": lambda: optaxclip.clip_by_block_rms(1.0),
    "zclip": lambda: optaxclip.zclip(),
    "autoclip": lambda: optaxclip.autoclip(),
    "adagc (leaf)": lambda: optaxclip.adagc(),
    "Optax's AGC": lambda: optax.adaptive_grad_clip(0.01),
    "AGC": lambda: optaxclip.adaptive_grad_clip(0.01),
    "Optax's clip": lambda: optax.clip(1.0),
    "clip": lambda: optaxclip.clip(1.0),
}
NO_CLIP = "no clip"


def shapes_of(tree: dict, dtype=jnp.float32) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in tree.items()}


def numbers(tree: dict, dtype=jnp.float32) -> dict:
    """Normal numbers in the shapes of a tree; any norm is far over 1."""
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for name, shape in tree.items()}


def train_step(tx, tree: dict, dtype=jnp.float32) -> jax.stages.Compiled:
    """A compiled step with donated parameters and state, in the order of the outputs that they become."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = shapes_of(tree), shapes_of(tree, dtype)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), grads).compile()


def account(compiled: jax.stages.Compiled, tree: dict, dtype=jnp.float32) -> tuple[float, float]:
    """XLA's account of a step: bytes accessed a parameter, and temporaries relative to the gradients' size."""
    count = sum(map(math.prod, tree.values()))
    size = count * jnp.dtype(dtype).itemsize
    return compiled.cost_analysis()["bytes accessed"] / count, compiled.memory_analysis().temp_size_in_bytes / size


def chain(small: bool) -> str:
    """In a chain: bytes and time beside the bare optimizer."""
    text = []
    everything = [("GPT-2 small", "adamw", CLIPS), ("ResNet-50", "adamw", CLIPS), ("LoRA", "adamw", _few())]
    everything += [("ResNet-50", name, _few()) for name in list(OPTIMIZERS)[1:]]
    for dtype in (jnp.float32, jnp.bfloat16):
        for tree, optimizer, clips in everything[:1] if small else everything:
            shapes = {"w": (64, 64), "b": (64,)} if small else TREES[tree]()
            rows = _chain_rows(shapes, OPTIMIZERS[optimizer](), clips, dtype, 3 if small else 15)
            text += [f"### {tree}, {optimizer}, {jnp.dtype(dtype).name} gradients\n", _chain_table(rows)]
    return "\n".join(text)


def _few() -> dict:
    return {name: CLIPS[name] for name in ("Optax's global norm", "global norm", "leaf norm", "Optax's AGC", "AGC")}


def _chain_rows(shapes: dict, optimizer, clips: dict, dtype, rounds: int) -> list[list[str]]:
    clips = {NO_CLIP: optax.identity} | clips
    steps, accounts = {}, {}
    params = numbers(shapes)
    shared = [params, optimizer.init(params)]
    grads = numbers(shapes, dtype)
    for name, make in clips.items():
        step = train_step(optax.chain(make(), optimizer), shapes, dtype)
        steps[name] = _turn(step, [make().init(shared[0])], shared, grads)
        accounts[name] = account(step, shapes, dtype)
    times, bare = ratios(race(steps, rounds), NO_CLIP), accounts[NO_CLIP]
    return [[name, times[name], *_beside(accounts[name], bare)] for name in clips]


def _turn(step: Callable, own: list, shared: list, grads: dict) -> Callable:
    """A step on the parameters and the optimizer's state that all clips share, to save memory."""

    def run():
        shared[0], (own[0], shared[1]) = step(shared[0], (own[0], shared[1]), grads)
        return shared[0]

    return run


def _beside(account: tuple[float, float], bare: tuple[float, float]) -> list[str]:
    if account is bare:
        return [f"{bare[0]:.1f}", f"{bare[1]:.2f}"]
    return [f"+{account[0] - bare[0]:.1f}", f"{account[1] - bare[1]:+.2f}"]


def _chain_table(rows: list[list[str]]) -> str:
    return table(["clip", "time", "bytes a parameter", "temporaries / gradients"], rows)


def alone(small: bool) -> str:
    """Alone, jitted and donated, beside Optax and beside a loop in C over the same bytes."""
    rows, rounds = [], 3 if small else 21
    for tree in TREES:
        shapes = {"w": (64, 64), "b": (64,)} if small else TREES[tree]()
        for dtype in (jnp.float32, jnp.bfloat16):
            for case in ("clips", "does not clip"):
                seconds = race(_alone_runs(shapes, dtype, case == "clips"), rounds)
                found = ratios(seconds, "Optax")
                rows.append([tree, jnp.dtype(dtype).name, case, found["ours"], found.get("C", "")])
    return table(["tree", "gradients", "case", "ours / Optax", "C / Optax"], rows)


def _alone_runs(shapes: dict, dtype, clips: bool) -> dict:
    """Clips in place of gradients that shrink a little at each call, or are left as they are."""
    grads = numbers(shapes, dtype)
    length = float(optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)))
    hold = {"grads": grads, "bound": length}

    def run_with(make):
        def step(grads, bound):
            tx = make(bound)
            return tx.update(grads, tx.init(grads))[0]

        jitted = jax.jit(step, donate_argnums=0)

        def run():
            hold["bound"] *= 0.99 if clips else 1.01
            hold["grads"] = jitted(
                hold["grads"], jnp.asarray(hold["bound"], dtype if make is of_optax else jnp.float32)
            )
            return hold["grads"]

        return run

    def of_optax(bound):
        return optax.clip_by_global_norm(bound)

    runs = {"Optax": run_with(of_optax), "ours": run_with(optaxclip.clip_by_global_norm)}
    in_c = hand_written.clip(shapes, scales=clips) if dtype == jnp.float32 else None
    return runs | ({"C": in_c} if in_c else {})


def safe_norm(small: bool) -> str:
    """The norm that neither overflows nor underflows, beside the plain one."""
    rows = []
    for tree in TREES:
        grads = numbers({"w": (64, 64)} if small else TREES[tree]())
        tx = optaxclip.clip_by_global_norm(1.0)
        state = tx.init(grads)
        plain = jax.jit(optax.tree.norm)
        ours = jax.jit(lambda grads, tx=tx, state=state: tx.update(grads, state)[1].metrics.grad_norm)
        runs = {"plain": lambda f=plain, g=grads: f(g), "ours": lambda f=ours, g=grads: f(g)}
        rows.append([tree, ratios(race(runs, 3 if small else 41), "plain")["ours"]])
    return table(["tree", "safe norm / plain norm"], rows)


def eager(small: bool) -> str:
    """Called without jit."""
    rows = []
    for count in (10, 100) if small else (10, 100, 500):
        grads = numbers({f"leaf{i}": (100 + i % 20,) for i in range(count)})
        runs = {}
        for name, make in (("Optax", optax.clip_by_global_norm), ("ours", optaxclip.clip_by_global_norm)):
            tx = make(1.0)
            state = tx.init(grads)
            runs[name] = lambda tx=tx, state=state, g=grads: tx.update(g, state)[0]
        times = race(runs, 3 if small else 15)
        rows.append([str(count), quartiles(times["Optax"] / times["ours"])])
    return table(["leaves", "times faster than Optax"], rows)


def compiling(small: bool) -> str:
    """Trace and compile, CPU seconds, of trees of many small leaves."""
    clips = {
        "global norm": CLIPS["global norm"],
        "leaf norm": CLIPS["leaf norm"],
        "adagc (leaf)": CLIPS["adagc (leaf)"],
    }
    rows = []
    for count in (20,) if small else (500, 1000, 2000, 5000):
        cost = {name: _compile_seconds(make(), small_leaves(count)) for name, make in clips.items()}
        theirs = _compile_seconds(optax.clip_by_global_norm(1.0), small_leaves(count)) if count <= 2000 else math.nan
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
    for blocks, window in ((1, 50), (3, 50)) if small else ((1, 1000), (1, 10_000), (150, 1000), (150, 10_000)):
        norms = jax.random.uniform(jax.random.key(0), (window, blocks))
        rows.append([str(blocks), f"{window:,}", quartiles(_percentile_ratios(norms, 3 if small else 15))])
    return table(["blocks", "window", "times faster than jnp.percentile"], rows)


def _percentile_ratios(norms: jax.Array, rounds: int) -> np.ndarray:
    window, blocks = norms.shape
    threshold = optaxclip.percentile(10.0, window=window)
    update = jax.jit(threshold.update, donate_argnums=1)
    full = jax.jit(lambda s: jax.lax.scan(lambda s, n: (threshold.update(n, s)[1], None), s, norms)[0])
    hold = {"state": full(threshold.init(jnp.zeros(blocks))), "ring": norms}

    def ours():
        bound, hold["state"] = update(norms[7], hold["state"])
        return bound

    def sorted_anew(norm, ring):
        ring = ring.at[3].set(norm)
        return jnp.percentile(ring, 10.0, axis=0), ring

    jitted = jax.jit(sorted_anew, donate_argnums=1)

    def theirs():
        bound, hold["ring"] = jitted(norms[7], hold["ring"])
        return bound

    hold["ring"] = norms + 0
    times = race({"jnp.percentile": theirs, "ours": ours}, rounds)
    return times["jnp.percentile"] / times["ours"]


SECTIONS = {f.__name__: f for f in (chain, alone, safe_norm, eager, compiling, percentiles)}


def main(argv=None) -> None:
    """Prints the tables, and puts them into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--small", action="store_true", help="tiny trees, three rounds: to see that it runs")
    parser.add_argument("--into", help="a document between whose marks the tables are put: docs/performance.md")
    args = parser.parse_args(argv)
    for name in args.only:
        start = time.perf_counter()
        text = f"Measured with {device()}.\n\n{SECTIONS[name](args.small)}"
        print(f"## {name} ({time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f})\n\n{text}", flush=True)
        if args.into:
            put_into(args.into, name, text)


if __name__ == "__main__":
    main()
