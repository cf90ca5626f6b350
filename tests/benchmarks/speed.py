"""What a clip costs, in bytes and in time, beside Optax and beside what the memory allows.

    python -m tests.benchmarks.speed [--only chain alone ...] [--small] [--into docs/performance.md]
    python -m tests.benchmarks.speed --picture docs/images/speed.png  # of docs/performance.md

Times are ratios between functions that took turns in one process, in an order that is reversed
every other round: the median, and the quartiles. Bytes and temporaries are those of the program
that XLA makes, and the same at every run.
"""

import argparse
import math
import os
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from tests.benchmarks import outside
from tests.benchmarks.overheads import compiling, eager, percentiles
from tests.benchmarks.reporting import device, put_into, race, ratios, table
from tests.benchmarks.running import count_bytes
from tests.benchmarks.trees import TREES, numbers, shapes_of

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


def train_step(
    tx, tree: dict, dtype=jnp.float32, options: dict | None = None
) -> jax.stages.Compiled:
    """A compiled step with donated parameters and state, in the order of the outputs that they
    become.
    """

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = shapes_of(tree), shapes_of(tree, dtype)
    return (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(tx.init, params), grads)
        .compile(options)
    )


def account(compiled: jax.stages.Compiled, tree: dict, dtype=jnp.float32) -> tuple[float, float]:
    """Of a step the bytes moved per parameter, and temporaries relative to the gradients' size."""
    count = sum(map(math.prod, tree.values()))
    size = count * jnp.dtype(dtype).itemsize
    return count_bytes(compiled) / count, compiled.memory_analysis().temp_size_in_bytes / size


def chain(small: bool) -> str:
    """In a chain: bytes and time beside the bare optimizer."""
    text = []
    everything = [
        ("GPT-2 small", "adamw", CLIPS),
        ("ResNet-50", "adamw", CLIPS),
        ("LoRA", "adamw", _few()),
    ]
    everything += [("ResNet-50", name, _few()) for name in list(OPTIMIZERS)[1:]]
    for dtype in (jnp.float32, jnp.bfloat16):
        for tree, optimizer, clips in everything[:1] if small else everything:
            shapes = {"w": (64, 64), "b": (64,)} if small else TREES[tree]()
            rows = _chain_rows(shapes, OPTIMIZERS[optimizer](), clips, dtype, 3 if small else 15)
            text += [
                f"### {tree}, {optimizer}, {jnp.dtype(dtype).name} gradients\n",
                _chain_table(rows),
            ]
    return "\n".join(text)


def _few() -> dict:
    return {
        name: CLIPS[name]
        for name in ("Optax's global norm", "global norm", "leaf norm", "Optax's AGC", "AGC")
    }


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
    return table(["clip", "time", "bytes per parameter", "temporaries / gradients"], rows)


def alone(small: bool) -> str:
    """Alone, jitted and donated, beside Optax and beside a loop in C over the same bytes."""
    rows, rounds = [], 3 if small else 21
    for tree in TREES:
        shapes = {"w": (64, 64), "b": (64,)} if small else TREES[tree]()
        for dtype in (jnp.float32, jnp.bfloat16):
            for case in ("clips", "does not clip"):
                seconds = race(_alone_runs(shapes, dtype, case == "clips"), rounds)
                found = ratios(seconds, "Optax")
                others = [found.get(name, "") for name in ("C", "PyTorch")]
                rows.append([tree, jnp.dtype(dtype).name, case, found["ours"], *others])
    return table(
        ["tree", "gradients", "case", "ours / Optax", "C / Optax", "PyTorch / Optax"], rows
    )


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
                hold["grads"],
                jnp.asarray(hold["bound"], dtype if make is of_optax else jnp.float32),
            )
            return hold["grads"]

        return run

    def of_optax(bound):
        return optax.clip_by_global_norm(bound)

    runs = {"Optax": run_with(of_optax), "ours": run_with(optaxclip.clip_by_global_norm)}
    others = {"C": outside.in_c, "PyTorch": outside.in_torch} if dtype == jnp.float32 else {}
    made = {name: make(shapes, scales=clips) for name, make in others.items()}
    return runs | {name: run for name, run in made.items() if run}


def safe_norm(small: bool) -> str:
    """The norm that neither overflows nor underflows, beside the plain one."""
    rows = []
    for tree in TREES:
        grads = numbers({"w": (64, 64)} if small else TREES[tree]())
        tx = optaxclip.clip_by_global_norm(1.0)
        state = tx.init(grads)
        plain = jax.jit(optax.tree.norm)
        ours = jax.jit(
            lambda grads, tx=tx, state=state: tx.update(grads, state)[1].metrics.grad_norm
        )
        runs = {"plain": lambda f=plain, g=grads: f(g), "ours": lambda f=ours, g=grads: f(g)}
        rows.append([tree, ratios(race(runs, 3 if small else 41), "plain")["ours"]])
    return table(["tree", "safe norm / plain norm"], rows)


SECTIONS = {f.__name__: f for f in (chain, alone, safe_norm, eager, compiling, percentiles)}


def draw(document: str, picture: str) -> None:
    """Time beside the optimizer alone, of the first two tables of a document with all clips:
    medians and quartiles.
    """
    import matplotlib.pyplot as plt

    with open(document) as file:
        tables = re.findall(r"### (GPT-2 small, .*?)\n(.*?)(?=###|<!--)", file.read(), re.DOTALL)
    fig, axes = plt.subplots(
        1, len(tables), figsize=(10, 4), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (title, text) in zip(axes[0], tables, strict=True):
        rows = re.findall(r"\| (.+?) \| ([\d.]+) \(([\d.]+)-([\d.]+)\)", text)
        names, (middle, low, high) = (
            [row[0] for row in rows],
            np.array([row[1:] for row in rows], float).T,
        )
        theirs = ["//" if "Optax" in name else "" for name in names]
        bars = {"color": "0.8", "edgecolor": "black", "hatch": theirs, "capsize": 3}
        ax.barh(names, middle, xerr=(middle - low, high - middle), **bars)
        ax.axvline(1, color="black", linestyle="--", linewidth=1)
        ax.set(title=title, xlabel="time / time of the optimizer alone")
    axes[0, 0].invert_yaxis()
    fig.savefig(picture, dpi=80)


def main(argv=None) -> None:
    """Prints the tables, and puts them into a document; or draws those of the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument(
        "--small", action="store_true", help="tiny trees, three rounds: to see that it runs"
    )
    parser.add_argument(
        "--into", help="a document between whose marks the tables are put: docs/performance.md"
    )
    parser.add_argument(
        "--picture",
        help="draw what stands in docs/performance.md to this file, and measure nothing",
    )
    args = parser.parse_args(argv)
    if args.picture:
        return draw("docs/performance.md", args.picture)
    for name in args.only:
        start = time.perf_counter()
        text = f"Measured with {device()}.\n\n{SECTIONS[name](args.small)}"
        took = f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
        print(f"## {name} ({took})\n\n{text}", flush=True)
        if args.into:
            put_into(args.into, name, text)


if __name__ == "__main__":
    main()
