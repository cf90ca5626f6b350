"""What a clip costs in bytes and in time, compared with Optax and with what the memory allows.

    python -m tests.benchmarks.speed [--only chain alone ...] [--small] [--into docs/performance.md]
    python -m tests.benchmarks.speed --picture docs/images/speed.png  # from docs/performance.md

Times are ratios between functions that take turns in one process, in an order that is reversed
every other round: the median and quartiles. Bytes and temporaries are those of the program that XLA
makes. They are the same at every run.
"""

import argparse
import math
import os
import re
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks import outside
from tests.benchmarks.overheads import measure_compilation, measure_eager, measure_percentiles
from tests.benchmarks.reporting import compare_times, describe_device, put_into, race, table
from tests.benchmarks.running import count_bytes
from tests.benchmarks.trees import TREES, draw_numbers, to_structs

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
FEW = "Optax's global norm", "global norm", "leaf norm", "Optax's AGC", "AGC"
NO_CLIP = "no clip"
SMALL = {"w": (64, 64), "b": (64,)}


def compile_step(
    tx, tree: dict, dtype=jnp.float32, options: dict | None = None
) -> jax.stages.Compiled:
    """Compiles a step. Parameters and state are donated, in the order of the outputs."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = to_structs(tree), to_structs(tree, dtype)
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile(options)


def account(compiled: jax.stages.Compiled, tree: dict, dtype=jnp.float32) -> tuple[float, float]:
    """Returns the bytes moved per parameter, and the temporaries relative to the gradients."""
    count = sum(map(math.prod, tree.values()))
    size = count * jnp.dtype(dtype).itemsize
    return count_bytes(compiled) / count, compiled.memory_analysis().temp_size_in_bytes / size


def measure_chain(small: bool) -> str:
    """Measures clips in a chain, relative to the bare optimizer."""
    few = {name: CLIPS[name] for name in FEW}
    chains = [("GPT-2 small", "adamw", CLIPS), ("ResNet-50", "adamw", CLIPS)]
    chains += [("LoRA", "adamw", few)]
    chains += [("ResNet-50", name, few) for name in OPTIMIZERS if name != "adamw"]
    head, text = ["clip", "time", "bytes per parameter", "temporaries / gradients"], []
    for dtype in (jnp.float32, jnp.bfloat16):
        for tree, optimizer, clips in chains[:1] if small else chains:
            shapes = SMALL if small else TREES[tree]()
            tx, rounds = OPTIMIZERS[optimizer](), 3 if small else 15
            rows = _make_chain_rows(shapes, tx, clips, dtype, rounds)
            title = f"### {tree}, {optimizer}, {jnp.dtype(dtype).name} gradients\n"
            text += [title, table(head, rows)]
    return "\n".join(text)


def _make_chain_rows(shapes: dict, optimizer, clips: dict, dtype, rounds: int) -> list[list[str]]:
    clips = {NO_CLIP: optax.identity} | clips
    steps, accounts = {}, {}
    params = draw_numbers(shapes)
    shared = [params, optimizer.init(params)]
    grads = draw_numbers(shapes, dtype)
    for name, make in clips.items():
        step = compile_step(optax.chain(make(), optimizer), shapes, dtype)
        steps[name] = _share_state(step, [make().init(shared[0])], shared, grads)
        accounts[name] = account(step, shapes, dtype)
    times, bare = compare_times(race(steps, rounds), NO_CLIP), accounts[NO_CLIP]
    return [[name, times[name], *_format_account(accounts[name], bare)] for name in clips]


def _share_state(step: Callable, own: list, shared: list, grads: dict) -> Callable:
    """Makes a step on parameters and optimizer state that all clips share, to save memory."""

    def run():
        shared[0], (own[0], shared[1]) = step(shared[0], (own[0], shared[1]), grads)
        return shared[0]

    return run


def _format_account(account: tuple[float, float], bare: tuple[float, float]) -> list[str]:
    if account is bare:
        return [f"{bare[0]:.1f}", f"{bare[1]:.2f}"]
    return [f"+{account[0] - bare[0]:.1f}", f"{account[1] - bare[1]:+.2f}"]


def measure_alone(small: bool) -> str:
    """Measures a clip alone, jitted and donated, relative to Optax's, and a loop in C."""
    rows, rounds = [], 3 if small else 21
    for tree in TREES:
        shapes = SMALL if small else TREES[tree]()
        for dtype in (jnp.float32, jnp.bfloat16):
            for case in ("clips", "does not clip"):
                seconds = race(_make_alone_runs(shapes, dtype, case == "clips"), rounds)
                times = compare_times(seconds, "Optax")
                others = [times.get(name, "") for name in ("C", "PyTorch")]
                rows.append([tree, jnp.dtype(dtype).name, case, times["ours"], *others])
    head = ["tree", "gradients", "case", "ours / Optax", "C / Optax", "PyTorch / Optax"]
    return table(head, rows)


def _make_alone_runs(shapes: dict, dtype, clips: bool) -> dict:
    """Makes clips of gradients in place, whose bound at each call is a little lower or higher."""
    grads = draw_numbers(shapes, dtype)
    length = float(optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)))
    hold = {"grads": grads, "bound": length}

    def make_run(make, bound_dtype):
        def step(grads, bound):
            tx = make(bound)
            return tx.update(grads, tx.init(grads))[0]

        jitted = jax.jit(step, donate_argnums=0)

        def run():
            hold["bound"] *= 0.99 if clips else 1.01
            hold["grads"] = jitted(hold["grads"], jnp.asarray(hold["bound"], bound_dtype))
            return hold["grads"]

        return run

    runs = {
        "Optax": make_run(optax.clip_by_global_norm, dtype),
        "ours": make_run(optaxclip.clip_by_global_norm, jnp.float32),
    }
    others = {"C": outside.make_c_clip, "PyTorch": outside.make_torch_clip}
    others = others if dtype == jnp.float32 else {}
    made = {name: make(shapes, scales=clips) for name, make in others.items()}
    return runs | {name: run for name, run in made.items() if run}


def measure_safe_norm(small: bool) -> str:
    """Measures the norm that neither overflows nor underflows, relative to the plain one."""
    tx, rows = optaxclip.clip_by_global_norm(1.0), []

    @jax.jit
    def take_norm(grads):
        return tx.update(grads, tx.init(grads))[1].metrics.grad_norm

    for tree in TREES:
        grads = draw_numbers({"w": (64, 64)} if small else TREES[tree]())
        norms = {"plain": jax.jit(optax.tree.norm), "ours": take_norm}
        runs = {name: partial(norm, grads) for name, norm in norms.items()}
        rows.append([tree, compare_times(race(runs, 3 if small else 41), "plain")["ours"]])
    return table(["tree", "safe norm / plain norm"], rows)


# By the names of their marks in docs/performance.md.
SECTIONS = {
    "chain": measure_chain,
    "alone": measure_alone,
    "safe_norm": measure_safe_norm,
    "eager": measure_eager,
    "compiling": measure_compilation,
    "percentiles": measure_percentiles,
}


def draw(document: str, picture: str) -> None:
    """Draws times relative to the bare optimizer, from the two tables of GPT-2 in a document."""
    import matplotlib.pyplot as plt

    with open(document) as file:
        tables = re.findall(r"### (GPT-2 small, .*?)\n(.*?)(?=###|<!--)", file.read(), re.DOTALL)
    look = {"figsize": (10, 4), "layout": "constrained"}
    fig, axes = plt.subplots(1, len(tables), sharey=True, squeeze=False, **look)
    for ax, (title, text) in zip(axes[0], tables, strict=True):
        rows = re.findall(r"\| (.+?) \| ([\d.]+) \(([\d.]+)-([\d.]+)\)", text)
        names = [row[0] for row in rows]
        middle, low, high = np.array([row[1:] for row in rows], float).T
        hatch = ["//" if "Optax" in name else "" for name in names]
        bars = {"color": "0.8", "edgecolor": "black", "hatch": hatch, "capsize": 3}
        ax.barh(names, middle, xerr=(middle - low, high - middle), **bars)
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="time / time of the optimizer alone")
    axes[0, 0].invert_yaxis()
    fig.savefig(picture, dpi=80)


def main(argv=None) -> None:
    """Prints the tables and writes them into a document, or draws those of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--small", action="store_true", help="tiny trees, to see that it runs")
    parser.add_argument("--into", help="document to write the tables into: docs/performance.md")
    parser.add_argument("--picture", help="draw the tables of docs/performance.md to this file")
    args = parser.parse_args(argv)
    if args.picture:
        return draw("docs/performance.md", args.picture)
    for name in args.only:
        start = time.perf_counter()
        text = f"Measured with {describe_device()}.\n\n{SECTIONS[name](args.small)}"
        took = f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
        print(f"## {name} ({took})\n\n{text}", flush=True)
        if args.into:
            put_into(args.into, name, text)


if __name__ == "__main__":
    main()
