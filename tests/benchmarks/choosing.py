"""The tables of docs/choosing.md: every method on every task, by default and tuned.

    uv run python -m tests.benchmarks.choosing
        [--methods zclip ...] [--tasks char_rnn ...] [--seeds 12] [--into docs/choosing.md]

The setting and the rate are picked on three seeds and judged on others, with clean batches and with
bad ones. Results are kept in a file, one line per task and method, and the next run continues from
there. Remove the file after a change of a task or a method. All runs of a method on a task are one
compiled program, under `vmap`.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optaxclip as oc
from tests.benchmarks.choosing_tables import REFERENCE, cap, report
from tests.benchmarks.reporting import describe_device, publish
from tests.benchmarks.speech import speech
from tests.benchmarks.trainings import Training, cartpole, char_rnn, digits_cnn, transformer

# Smaller than for `tuning`: each method trains 144 times on each task.
TASKS = {
    "char_rnn": lambda: char_rnn(batch=4)._replace(steps=200),
    "transformer": lambda: transformer(batch=4)._replace(steps=150),
    "digits_cnn": lambda: digits_cnn(batch=8)._replace(steps=120),
    "speech": speech,
    "cartpole": cartpole,
}
PICKING = 3  # the first seeds pick, the others judge
# The bad one of each hundred batches. An earlier one would only measure warm-ups.
BAD = 80


class Method(NamedTuple):
    """One method, and the number that one would tune.

    Attributes:
      number: its name.
      settings: its values, the default first.
      make: (number, optimizer) -> transformation.
    """

    number: str
    settings: tuple[float, ...]
    make: Callable[[Any, optax.GradientTransformation], optax.GradientTransformation]


def put_first(clip):
    """Puts a clip in front of the optimizer."""
    return lambda number, optimizer: optax.chain(clip(number), optimizer)


def skip(z, optimizer):
    return oc.skip_spikes(optimizer, oc.thresholds.window_zscore(z))


def cap_running(cap):
    return oc.clip_by(oc.thresholds.at_most(oc.thresholds.running(1.5), cap))


NORMS = 1.0, 0.03, 0.1, 0.3, 3.0, 10.0, 30.0, 100.0
SHARES = 0.01, 0.0025, 0.005, 0.02, 0.05, 0.1, 0.25, 1.0
SCORES = 0.25, 0.5, 1.0, 1.5
RATIOS = 1.1, 1.2, 1.5, 2.0, 3.0
SETTINGS = {
    "no clip": ("", (1.0,), lambda _: optax.identity()),
    "clip_by_global_norm": ("max_norm", NORMS, oc.clip_by_global_norm),
    "adaptive_grad_clip": ("clipping", SHARES, oc.adaptive_grad_clip),
    "zclip": ("z", (2.5, *SCORES, 2.0, 3.5, 5.0), oc.zclip),
    "autoclip": ("percentile", (10.0, 1.0, 5.0, 25.0, 50.0, 75.0, 90.0, 99.0), oc.autoclip),
    "clip_by_leaf_norm": ("max_norm", NORMS, oc.clip_by_leaf_norm),
    "clip": ("max_delta", (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4), oc.clip),
    "adagc": ("ratio", (1.05, 1.01, *RATIOS, 5.0), oc.adagc),
    "clip_by_median": ("scale", (2.0, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 5.0), oc.clip_by_median),
    "running, capped": ("cap", NORMS, cap_running),
    "adamw_clip": ("ratio", (3.0, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0), oc.adamw_clip),
    "quantile_clip": ("quantile", (0.5, 0.05, 0.1, 0.25, 0.75, 0.9, 0.95, 0.99), oc.quantile_clip),
    "clip_by_log_zscore": ("z", (2.0, *SCORES, 3.0, 4.0, 6.0), oc.clip_by_log_zscore),
    "u_clip": ("max_norm", NORMS, oc.u_clip),
    "limit_norm_growth": ("ratio", (1.01, 1.001, 1.03, *RATIOS), oc.limit_norm_growth),
    "spam_clip": ("threshold", (5000.0, 1.0, 5.0, 16.0, 50.0, 160.0, 500.0, 1500.0), oc.spam_clip),
    "smooth_clip": ("max_norm", NORMS, oc.smooth_clip),
}
METHODS = {name: Method(n, values, put_first(clip)) for name, (n, values, clip) in SETTINGS.items()}
METHODS["skip_spikes"] = Method("z", (6.0, 1.5, 2.0, 3.0, 4.0, 8.0, 12.0, 24.0), skip)


class Key(NamedTuple):
    """What identifies a line of the file of results."""

    task: str
    method: str
    seeds: int
    steps: int


class Run(NamedTuple):
    """One run, or many as arrays."""

    number: Any
    rate: Any
    seed: Any
    bad: Any


def prepare(task: Training, seeds: int) -> Training:
    """Compiles the initialization and the evaluation of a task once, for all methods."""
    starts = jax.jit(jax.vmap(lambda seed: task.init(jax.random.key(seed))))(jnp.arange(seeds))
    return task._replace(
        init=lambda seed: jax.tree.map(lambda p: p[seed], starts),
        evaluate=jax.jit(jax.vmap(task.evaluate)),
    )


def make_train(
    task: Training, method: Method, steps: int, bar
) -> Callable[[list[Run]], np.ndarray]:
    """Makes a function that trains many runs side by side and returns their scores."""

    def make_tx(run):
        return method.make(run.number, task.optimizer(run.rate))

    def start(run):
        params = task.init(run.seed)
        return params, make_tx(run).init(params)

    def step(params, state, run, i):
        key = jax.random.fold_in(jax.random.key(run.seed + 1000), i)
        grads = jax.grad(task.loss)(params, key, i, bad=run.bad & (i % 100 == BAD))
        updates, state = make_tx(run).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start_all = jax.jit(jax.vmap(start))
    step_all = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None)), donate_argnums=(0, 1))

    def train(runs):
        grid = Run(*map(jnp.asarray, zip(*runs, strict=True)))
        params, state = start_all(grid)
        for i in range(steps):
            params, state = step_all(params, state, grid, i)
            bar.update()
        return np.asarray(task.evaluate(params))

    return train


def measure(task: Training, method: Method, seeds: int, steps: int, bar) -> dict[str, Any]:
    """Picks the setting and the rate of a method, and judges it on other seeds.

    Returns the scores that pick, (settings, rates, seeds), and those that judge, (6, other seeds):
    of the default at each of three rates, of the best, and with bad batches of both.
    """
    train = make_train(task, method, steps, bar)
    settings, rates = method.settings, task.rates
    grid = itertools.product(settings, rates, range(PICKING), [False])
    picking = train([Run(*cell) for cell in grid]).reshape(len(settings), len(rates), PICKING)
    means = cap(picking, task.failed).mean(-1)
    usual = int(np.argmin(means[0]))
    setting, rate = map(int, np.unravel_index(np.argmin(means), means.shape))
    default, best = (settings[0], rates[usual]), (settings[setting], rates[rate])
    cells = [(settings[0], r, False) for r in rates]
    cells += [(*best, False), (*default, True), (*best, True)]
    others = range(PICKING, PICKING + seeds)
    judged = train([Run(n, r, seed, bad) for n, r, bad in cells for seed in others])
    picked = {"usual": usual, "setting": best[0], "rate": best[1]}
    return picked | {"picking": picking.tolist(), "judged": judged.reshape(-1, seeds).tolist()}


def load(path: pathlib.Path) -> dict[Key, dict[str, Any]]:
    """Loads the results so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Key(*(line[k] for k in Key._fields)): line for line in map(json.loads, lines)}


def measure_all(tasks: dict[str, Training], keys: list[Key], path: pathlib.Path) -> None:
    """Measures each task and method, and appends each line to the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = {key.task: PICKING + key.seeds for key in keys}
    tasks = {name: prepare(tasks[name], count) for name, count in seeds.items()}
    with tqdm(total=2 * sum(key.steps for key in keys), unit="step") as bar:
        for key in keys:
            bar.set_description(f"{key.task}: {key.method}")
            task, method = tasks[key.task], METHODS[key.method]
            line = key._asdict() | measure(task, method, key.seeds, key.steps, bar)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def parse_options(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=12, help="seeds that judge")
    parser.add_argument("--steps", type=int, help="steps of each run; default: those of the task")
    kept = pathlib.Path("build/choosing.jsonl")
    parser.add_argument("--kept", type=pathlib.Path, default=kept, help="file of results")
    parser.add_argument("--no-more", action="store_true", help="only write what is in the file")
    parser.add_argument("--into", help="document to write the tables into")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_options(argv)
    tasks = {name: TASKS[name]() for name in args.tasks}
    keys = [
        Key(name, method, args.seeds, args.steps or task.steps)
        for method in dict.fromkeys([*args.methods, REFERENCE])
        for name, task in tasks.items()
    ]
    left = [key for key in keys if key not in load(args.kept)]
    if left and not args.no_more:
        measure_all(tasks, left, args.kept)
    done = load(args.kept)
    numbers = {name: method.number for name, method in METHODS.items()}
    summary, text = report(tasks, numbers, [done[key] for key in keys if key in done])
    publish(summary, args.into, "summary")
    publish(f"Written with {describe_device()}.\n\n{text}", args.into, "results")


if __name__ == "__main__":
    main()
