"""Every method on every task, at its defaults and at its best: the tables of docs/choosing.md.

    uv run python -m tests.benchmarks.choosing
        [--methods zclip ...] [--tasks char_rnn ...] [--seeds 5]

All settings, learning rates and seeds of a method are one compiled program, vmapped; about ten
minutes on two cores.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optaxclip as oc
from tests.benchmarks.reporting import put_into
from tests.benchmarks.reporting import table as as_table
from tests.benchmarks.trainings import TRAININGS, Training


class Method(NamedTuple):
    """One method, and the number that one would tune.

    Attributes:
      number: what the number is.
      settings: its values, the default first.
      make: (number, optimizer) -> transformation.
    """

    number: str
    settings: tuple[float, ...]
    make: Callable[[Any, optax.GradientTransformation], optax.GradientTransformation]


def before(clip):
    """A clip in front of the optimizer."""
    return lambda number, optimizer: optax.chain(clip(number), optimizer)


def by(threshold):
    return before(lambda number: oc.clip_by(threshold(number)))


METHODS = {
    "no clip": Method("", (1.0,), before(lambda number: oc.clip_by(jnp.inf))),
    "clip_by_global_norm": Method("max_norm", (1.0, 0.1, 10.0), before(oc.clip_by_global_norm)),
    "clip_by_leaf_norm": Method("max_norm", (1.0, 0.1, 10.0), before(oc.clip_by_leaf_norm)),
    "smooth_clip": Method("max_norm", (1.0, 0.1, 10.0), before(oc.smooth_clip)),
    "clip": Method("max_delta", (1.0, 0.1, 0.01), before(oc.clip)),
    "u_clip": Method("max_norm", (1.0, 0.1, 10.0), before(oc.u_clip)),
    "adaptive_grad_clip": Method("clipping", (0.01, 0.05, 0.25), before(oc.adaptive_grad_clip)),
    "autoclip": Method("percentile", (10.0, 50.0, 90.0), before(oc.autoclip)),
    "naive quantile": Method(
        "window 50, q", (90.0, 99.0, 75.0), by(lambda q: oc.thresholds.percentile(q, window=50))
    ),
    "quantile_clip": Method("quantile", (0.5, 0.25, 0.9), before(oc.quantile_clip)),
    "clip_by_median": Method("scale", (2.0, 1.0, 4.0), before(oc.clip_by_median)),
    "running": Method("factor", (2.0, 1.1, 4.0), by(oc.thresholds.running)),
    "running, capped": Method(
        "cap",
        (1.0, 0.1, 10.0),
        by(lambda cap: oc.thresholds.at_most(oc.thresholds.running(1.5), cap)),
    ),
    "zclip": Method("z", (2.5, 1.0, 5.0), before(oc.zclip)),
    "clip_by_log_zscore": Method("z", (2.0, 1.0, 4.0), before(oc.clip_by_log_zscore)),
    "adagc": Method("ratio", (1.05, 1.5, 3.0), before(oc.adagc)),
    "limit_norm_growth": Method("ratio", (1.01, 1.1, 2.0), before(oc.limit_norm_growth)),
    "band_clip": Method("high", (2.0, 1.2, 4.0), before(lambda high: oc.band_clip(0.5, high))),
    "spam_clip": Method("threshold", (5000.0, 50.0, 5.0), before(oc.spam_clip)),
    "adamw_clip": Method("ratio", (3.0, 1.0, 10.0), before(oc.adamw_clip)),
    "skip_spikes": Method(
        "z",
        (6.0, 3.0, 12.0),
        lambda z, inner: oc.skip_spikes(inner, oc.thresholds.window_zscore(z)),
    ),
}


def final_losses(task: Training, method: Method, seeds: int, steps: int, bar) -> np.ndarray:
    """What runs end with, (settings, rates, seeds); infinite if that is not a number."""
    grid = [(n, r, k) for n in method.settings for r in task.rates for k in range(seeds)]
    number, rate, seed = map(jnp.asarray, zip(*grid, strict=True))

    def transformation(number, rate):
        return method.make(number, task.optimizer(rate))

    def start(number, rate, seed):
        params = task.init(jax.random.key(seed))
        return params, transformation(number, rate).init(params)

    def step(params, state, number, rate, seed, i):
        key = jax.random.fold_in(jax.random.key(seed + 1000), i)
        grads = jax.grad(task.loss)(params, key, i)
        updates, state = transformation(number, rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(jax.vmap(start))(number, rate, seed)
    step_all = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None)), donate_argnums=(0, 1))
    for i in range(steps):
        params, state = step_all(params, state, number, rate, seed, i)
        bar.update()
    losses = jax.jit(jax.vmap(task.evaluate))(params)
    shape = len(method.settings), len(task.rates), seeds
    return np.nan_to_num(np.asarray(losses), nan=np.inf, posinf=np.inf).reshape(shape)


def row(name: str, task: Training, method: Method, losses: np.ndarray) -> list[str]:
    """A line of the table: the best rate at the defaults, and the best setting and rate."""

    def shown(setting, rate):
        runs = losses[setting, rate]
        worst = "diverged" if runs.max() > task.failed else f"{runs.max():.2f}"
        return [f"{np.median(runs):.2f}", worst]

    medians = np.median(losses, axis=-1)
    rate = int(np.argmin(medians[0]))
    at = np.unravel_index(np.argmin(medians), medians.shape)
    failed = int(np.sum(losses[0] > task.failed))
    best = f"{method.number} {method.settings[at[0]]:g}" if len(method.settings) > 1 else ""
    label = name if name in ("no clip", "naive quantile") else f"`{name}`"
    return [label, *shown(0, rate), f"{failed}", best, f"{task.rates[at[1]]:g}", *shown(*at)]


HEAD = [
    "method",
    "default: median",
    "worst",
    "lost, all rates",
    "best setting",
    "best rate",
    "median",
    "worst",
]


def table(task: Training, rows: list[list[str]], seeds: int, steps: int) -> str:
    rates = ", ".join(f"{rate:g}" for rate in task.rates)
    title = f"### {task.name}\n\n{steps} steps, {seeds} seeds at each of the rates {rates}.\n"
    return f"{title}\n{as_table(HEAD, rows)}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run; by default each task's own number")
    parser.add_argument(
        "--into", help="a document between whose markers the tables are put: docs/choosing.md"
    )
    args = parser.parse_args(argv)
    tasks = [TRAININGS[name]() for name in args.tasks]
    steps = {task.name: args.steps or task.steps for task in tasks}
    text = []
    with tqdm(total=len(args.methods) * sum(steps.values()), unit="step") as bar:
        for task in tasks:
            rows = []
            for name in args.methods:
                bar.set_description(f"{task.name}: {name}")
                losses = final_losses(task, METHODS[name], args.seeds, steps[task.name], bar)
                rows.append(row(name, task, METHODS[name], losses))
            text.append(table(task, rows, args.seeds, steps[task.name]))
            print("\n" + text[-1], flush=True)
    if args.into:
        put_into(
            args.into,
            "results",
            f"Written with jax {jax.__version__} on a CPU.\n\n" + "\n".join(text),
        )


if __name__ == "__main__":
    main()
