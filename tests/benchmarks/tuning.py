"""Does the threshold that `optaxclip.tune` recommends beat the default, and no clip, on new seeds?

    uv run python -m tests.benchmarks.tuning
        [--into docs/tuning.md] [--picture docs/images/tuning.png]

Each task is tuned on three seeds and judged on ten others, which means other initial parameters and
other batches. This is done twice: with all methods (recommended, default, no clip) at the largest
learning rate of the task, and with each at the rate that was its best on the tuning seeds.
"""

import argparse

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.tuning import Sweep
from optaxclip.tuning.sweep import cap_diverged
from tests.benchmarks.reporting import publish
from tests.benchmarks.trainings import TRAININGS, Training

VALUES = tuple(float(f"{value:.2g}") for value in np.geomspace(0.01, 1000, 11))
DEFAULT = 1.0


def make_functions(task: Training, rate: float):
    """Makes what `tune` takes: the train step, the initial state and the evaluation."""

    def make_tx(value):
        return optax.chain(optaxclip.clip_by_global_norm(value), task.optimizer(rate))

    def init(value, key):
        params = task.init(key)
        return params, make_tx(value).init(params), jax.random.fold_in(key, 1)

    def step(value, state, i):
        params, opt_state, key = state
        loss, grads = jax.value_and_grad(task.loss)(params, jax.random.fold_in(key, i), i)
        updates, opt_state = make_tx(value).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    return step, init, lambda state: task.evaluate(state[0])


def sweep_bounds(task: Training, rate: float, values, seeds, steps: int) -> Sweep:
    step, init, evaluate = make_functions(task, rate)
    return optaxclip.tune(
        step, init, values, batches=range(steps), seeds=seeds, evaluate=evaluate, failed=task.failed
    )


def format_row(task: Training, rate: float, title: str, wanted: float, sweep: Sweep) -> str:
    """Formats a row of the table: one threshold on the unseen seeds."""
    (at,) = np.flatnonzero(sweep.values == wanted)
    final = np.where(np.isnan(sweep.final[at]), np.inf, sweep.final[at])
    label = title if wanted == np.inf else f"{title}: {wanted:g}"
    median = np.quantile(final, 0.5, method="higher")
    rated, lost = f"{sweep.clip_rate[at]:.0%}", f"{sweep.diverged[at].sum()} of {final.size}"
    ends = f"{median:.3g} | {final.max():.3g}"
    return f"| {task.name} | {rate:g} | {label} | {ends} | {rated} | {lost} |"


HEAD = """| task | rate | `max_norm` | median | worst | clipped | diverged |
|---|---|---|---|---|---|---|"""


def compute_score(sweep: Sweep, wanted: float) -> float:
    """Computes the mean final loss at one value. A diverged run counts as untrained."""
    (at,) = np.flatnonzero(sweep.values == wanted)
    return float(np.mean(cap_diverged(sweep.final[at], sweep.failed)))


def measure(
    name: str, values, seeds: int, unseen: int, steps: int | None
) -> tuple[Sweep, list, list]:
    """Returns the sweep at the largest rate, the rows at that rate, and those at the best rates."""
    task = TRAININGS[name]()
    steps, largest = steps or task.steps, max(task.rates)
    sweeps, judged, chosen = {}, {}, {}
    for rate in task.rates:
        sweeps[rate] = sweep_bounds(task, rate, values, range(seeds), steps)
        value = sweeps[rate].recommended.value
        recommended = DEFAULT if np.isnan(value) else value
        chosen[rate] = {"recommended": recommended, "default": DEFAULT, "no clip": np.inf}
        bounds, others = list(chosen[rate].values()), range(100, 100 + unseen)
        judged[rate] = sweep_bounds(task, rate, bounds, others, steps)

    def format_one(title: str, rate: float) -> str:
        return format_row(task, rate, title, chosen[rate][title], judged[rate])

    def find_best_rate(title: str) -> float:
        return min(task.rates, key=lambda rate: compute_score(sweeps[rate], chosen[rate][title]))

    same = [format_one(title, largest) for title in chosen[largest]]
    own = [format_one(title, find_best_rate(title)) for title in chosen[largest]]
    return sweeps[largest], same, own


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = ["char_rnn", "cartpole", "transformer"]
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=TRAININGS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds to tune on")
    parser.add_argument("--unseen", type=int, default=10, help="seeds to judge on")
    parser.add_argument("--steps", type=int, help="steps of each run; default: those of the task")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--into", help="document to write the tables into")
    parser.add_argument("--picture", help="file for a picture of the sweep of the first task")
    args = parser.parse_args(argv)
    values, same, own = (VALUES[4:6] if args.small else VALUES), [], []
    seeds, unseen, steps = (2, 2, 3) if args.small else (args.seeds, args.unseen, args.steps)
    for name in args.tasks:
        sweep, *rows = measure(name, values, seeds, unseen, steps)
        print(f"{name}\n\n{sweep}\n", flush=True)
        same, own = same + rows[0], own + rows[1]
        if args.picture and name == args.tasks[0]:
            optaxclip.plots.plot_sweep(sweep).figure.savefig(args.picture, dpi=80)
    lines = ["All at the largest rate:\n", HEAD, *same, "\nEach at its best rate:\n", HEAD, *own]
    publish("\n".join(lines), args.into, "results")


if __name__ == "__main__":
    main()
