"""Every clip on every task, at its default and at its best: writes docs/choosing-results.md.

    uv run --extra test python -m tests.benchmarks.compare [--methods zclip ...] [--tasks rnn ...] [--steps 100]

All settings, learning rates and seeds of a method train side by side in one program, with the same starts and the same
batches; the gradient of a task is compiled once for all methods.
"""

import argparse
import functools
import itertools
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optaxclip as oc
from tests.benchmarks.tasks import TASKS, Task


class Method(NamedTuple):
    """A method, and the number in it that one would tune.

    Attributes:
      number: what the number is called.
      values: what is tried, first the default, or what is customary where there is none.
      wrap: (number, optimizer) -> the optimizer with the clip.
    """

    number: str
    values: tuple[float, ...]
    wrap: Callable[[Any, optax.GradientTransformation], optax.GradientTransformation]


def clip(number: str, values: tuple[float, ...], make: Callable[[Any], optax.GradientTransformation]) -> Method:
    """A clip in front of the optimizer."""
    return Method(number, values, lambda value, optimizer: optax.chain(make(value), optimizer))


def threshold(number: str, values: tuple[float, ...], make: Callable[[Any], optax.GradientTransformation]) -> Method:
    return clip(number, values, lambda value: oc.clip_by(make(value)))


def skip(number: str, values: tuple[float, ...], make: Callable[[Any], optax.GradientTransformation]) -> Method:
    return Method(number, values, lambda value, optimizer: oc.skip_spikes(optimizer, make(value)))


NORMS = (1.0, 0.1, 10.0)
REFERENCES = ("no clip", "clip_by_global_norm")
METHODS = {
    "no clip": Method("rate times", (1.0, 0.5, 0.1), lambda value, tx: optax.chain(tx, optax.scale(value))),
    "clip_by_global_norm": clip("max_norm", NORMS, oc.clip_by_global_norm),
    "clip_by_leaf_norm": clip("max_norm", NORMS, oc.clip_by_leaf_norm),
    "smooth_clip": clip("max_norm", NORMS, oc.smooth_clip),
    "u_clip": clip("max_norm", NORMS, oc.u_clip),
    "clip": clip("max_delta", (1.0, 0.1, 0.01), oc.clip),
    "clip_by_block_rms": clip("threshold", (1.0, 0.1, 0.01), oc.clip_by_block_rms),
    "adaptive_grad_clip": clip("clipping", (0.01, 0.05, 0.25), oc.adaptive_grad_clip),
    "adaptive_grad_clip, not the head": clip(
        "clipping", (0.01, 0.05, 0.25), lambda value: oc.adaptive_grad_clip(value, exclude="^head$")
    ),
    "autoclip": clip("percentile", (10.0, 50.0, 90.0), oc.autoclip),
    "naive quantile": threshold("percentile", (90.0, 50.0, 99.0), lambda q: oc.percentile(q, window=100)),
    "quantile_clip": clip("quantile", (0.5, 0.1, 0.9), oc.quantile_clip),
    "clip_by_median": clip("scale", (2.0, 1.0, 4.0), oc.clip_by_median),
    "running": threshold("factor", (2.0, 1.1, 4.0), oc.running),
    "running, capped": threshold("cap", NORMS, lambda cap: oc.at_most(oc.running(1.5), cap)),
    "zclip": clip("z_threshold", (2.5, 1.0, 5.0), oc.zclip),
    "zclip, capped": clip("max_norm", NORMS, lambda cap: oc.zclip(max_norm=cap)),
    "clip_by_log_zscore": clip("z_threshold", (2.0, 1.0, 4.0), oc.clip_by_log_zscore),
    "adagc": clip("ratio", (1.05, 1.2, 2.0), oc.adagc),
    "limit_norm_growth": clip("ratio", (1.01, 1.1, 2.0), oc.limit_norm_growth),
    "band_clip": clip("high", (2.0, 1.2, 4.0), lambda high: oc.band_clip(0.5, high)),
    "clip_by_momentum_norm": clip("ratio", (10.0, 5.0, 20.0), oc.clip_by_momentum_norm),
    "spam_clip": clip("threshold", (5000.0, 50.0, 5.0), oc.spam_clip),
    "adamw_clip": clip("ratio", (3.0, 1.0, 10.0), oc.adamw_clip),
    "skip_spikes": skip("z", (6.0, 3.0, 12.0), oc.window_zscore),
    "skip_spikes, running": skip(
        "factor", (20.0, 5.0, 2.0), lambda factor: oc.running(factor, feed=oc.accepted, relearn_after=100)
    ),
}


def trainer(task: Task, seeds: int, steps: int) -> Callable[[Method, tqdm], np.ndarray]:
    """A function that trains a method: what runs end with, (values, rates, seeds), infinite if diverged."""
    starts = jax.vmap(task.init)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
    keys = jax.vmap(jax.random.key)(1000 + jnp.arange(seeds))

    @jax.jit
    def learn(params, i):
        batches = jax.vmap(lambda key: task.batch(jax.random.fold_in(key, i)))(keys)
        return jax.vmap(jax.vmap(jax.value_and_grad(task.loss)), (0, None))(params, batches)

    evaluate = jax.jit(jax.vmap(jax.vmap(task.evaluate)))

    def train(method: Method, bar: tqdm) -> np.ndarray:
        start, move = stepper(task, method)
        params, state = start(starts)
        for i in range(steps):
            params, state = move(params, state, *learn(params, i))
            bar.update()
        ends = np.asarray(evaluate(params)).reshape(len(method.values), len(task.rates), seeds)
        return np.where(ends < 0.95 * task.guess, ends, np.inf)

    return train


def stepper(task: Task, method: Method):
    """Two functions for all runs of a method: their start, and one step of the optimizer."""
    grid = itertools.product(method.values, task.rates)
    values, rates = (jnp.asarray(column) for column in zip(*grid, strict=True))

    def wrapped(value, rate):
        return method.wrap(value, task.optimizer(rate))

    def start(value, rate, params):
        return params, wrapped(value, rate).init(params)

    def move(value, rate, params, state, loss, grads):
        updates, state = wrapped(value, rate).update(grads, state, params, loss=loss)
        return optax.apply_updates(params, updates), state

    # Over runs, and in each over seeds; the starts are the same for all runs.
    start = jax.vmap(jax.vmap(start, (None, None, 0)), (0, 0, None))
    move = jax.vmap(jax.vmap(move, (None, None, 0, 0, 0, 0)))
    return jax.jit(functools.partial(start, values, rates)), jax.jit(
        functools.partial(move, values, rates), donate_argnums=(0, 1)
    )


class Result(NamedTuple):
    """What a method reached on a task at one setting and rate; `min` finds the best.

    Attributes:
      diverged: how many seeds did.
      median, worst: over seeds; infinite if that one diverged.
      value, rate: the setting.
    """

    diverged: int
    median: float
    worst: float
    value: float
    rate: float

    def __str__(self):
        worst = f"{self.diverged} diverged" if self.diverged else f"{self.worst:.2f}"
        return worst if np.isinf(self.median) else f"{self.median:.2f} / {worst}"


class Row(NamedTuple):
    """All results of a method on a task, the default's and those of any setting."""

    name: str
    default: list[Result]
    tuned: list[Result]


def row(name: str, task: Task, ends: np.ndarray) -> Row:
    grid = [
        Result(int(np.sum(np.isinf(runs))), float(np.median(runs)), float(np.max(runs)), value, rate)
        for value, of_value in zip(METHODS[name].values, ends, strict=True)
        for rate, runs in zip(task.rates, of_value, strict=True)
    ]
    return Row(name, grid[: len(task.rates)], grid)


def cells(row: Row, largest: float) -> list[str]:
    best, best_default = min(row.tuned), min(row.default)
    number = METHODS[row.name].number
    return [
        f"**{row.name}**" if row.name in REFERENCES else row.name,
        f"{number} {row.default[0].value:g}",
        f"{best_default}, at {best_default.rate:g}",
        str(row.default[-1]),
        str(sum(result.diverged for result in row.default)),
        f"{number} {best.value:g}",
        f"{best}, at {best.rate:g}",
        str(min(result for result in row.tuned if result.rate == largest)),
    ]


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def table(task: Task, rows: list[Row], seeds: int, steps: int) -> str:
    """The table of one task, the best first."""
    largest = max(task.rates)
    head = ["method", "default", "best rate", f"rate {largest:g}", "diverged", "best setting", "best rate"]
    lines = [cells(row, largest) for row in sorted(rows, key=lambda row: min(row.tuned))]
    rates = ", ".join(f"{rate:g}" for rate in task.rates)
    about = f"{steps} steps, {seeds} seeds, rates {rates}. Guessing: {task.guess:.2f}."
    return f"## {task.title}\n\n{about}\n\n{markdown([*head, f'rate {largest:g}'], lines)}"


HEAD = """# Results

Written by `{command}` with jax {jax} on a CPU ({cpu}).

Each cell is the median and the worst over seeds of what is reported at the end of training, the lower the better; or how
many of the {seeds} seeds diverged, that is: ended within 5 % of guessing by frequency, or worse. First at the default
setting (where there is none, at a customary one), at the best learning rate of the grid and at the largest, and how many
of its runs at all rates diverged; then at the best of three settings, also there. The best has the fewest diverged
seeds, then the lowest median; it is picked by the seeds that it is reported for. "No clip" tunes the rate itself: its
settings are factors of the rates, so it has the choice of twelve. Lines are sorted by the best; references are bold.
"""


def main(argv: Sequence[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run; by default each task has its own number")
    parser.add_argument("--out", default="docs/choosing-results.md")
    args = parser.parse_args(argv)
    tasks = {name: TASKS[name]() for name in args.tasks}
    steps = {name: args.steps or task.steps for name, task in tasks.items()}
    results, tables = {}, []
    with tqdm(total=len(args.methods) * sum(steps.values()), unit="step") as bar:
        for name, task in tasks.items():
            train = trainer(task, args.seeds, steps[name])
            results[name] = []
            for method in args.methods:
                bar.set_description(f"{name}: {method}")
                results[name].append(row(method, task, train(METHODS[method], bar)))
            tables.append(table(task, results[name], args.seeds, steps[name]))
            bar.write(tables[-1])
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m tests.benchmarks.compare {given}".strip()
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    head = HEAD.format(command=command, jax=jax.__version__, cpu=cpu, seeds=args.seeds)
    pathlib.Path(args.out).write_text("\n".join([head, *tables]))
    return results


if __name__ == "__main__":
    main()
