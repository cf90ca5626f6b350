"""Does the threshold that `optaxclip.tune` recommends beat the default, and no clip, on new seeds?

    uv run python -m tests.benchmarks.tuning
        [--into docs/tuning.md] [--picture docs/images/tuning.png]

Each task is tuned on three seeds and judged on ten others: other starts and other batches. Twice:
all at the largest learning rate of the task, and each (recommended, default, no clip) at the rate
that was its best on the tuning seeds.
"""

import argparse

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.tuning.sweep import cap_diverged
from tests.benchmarks.reporting import publish
from tests.benchmarks.trainings import TRAININGS, Training

VALUES = tuple(float(f"{value:.2g}") for value in np.geomspace(0.01, 1000, 11))
DEFAULT = 1.0


def functions(task: Training, rate: float):
    """What `tune` takes: a train step, a start and an evaluation."""

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


def tuned(task: Training, rate: float, values, seeds, steps: int) -> optaxclip.tuning.Sweep:
    step, init, evaluate = functions(task, rate)
    return optaxclip.tune(
        step, init, values, batches=range(steps), seeds=seeds, evaluate=evaluate, failed=task.failed
    )


def line(
    task: Training, rate: float, title: str, wanted: float, sweep: optaxclip.tuning.Sweep
) -> str:
    """A row of the table: one threshold on the unseen seeds."""
    (at,) = np.flatnonzero(sweep.values == wanted)
    final = np.where(np.isnan(sweep.final[at]), np.inf, sweep.final[at])
    label = title if wanted == np.inf else f"{title}: {wanted:g}"
    median = np.quantile(final, 0.5, method="higher")
    rated, lost = f"{sweep.clip_rate[at]:.0%}", f"{sweep.diverged[at].sum()} of {final.size}"
    ends = f"{median:.3g} | {final.max():.3g}"
    return f"| {task.name} | {rate:g} | {label} | {ends} | {rated} | {lost} |"


HEAD = """| task | rate | `max_norm` | median | worst | clipped | diverged |
|---|---|---|---|---|---|---|"""


def score(sweep: optaxclip.tuning.Sweep, wanted: float) -> float:
    """The mean final loss at one value; a diverged run counts as no training."""
    (at,) = np.flatnonzero(sweep.values == wanted)
    return float(np.mean(cap_diverged(sweep.final[at], sweep.failed)))


def measured(
    name: str, values, seeds: int, unseen: int, steps: int | None
) -> tuple[optaxclip.tuning.Sweep, list, list]:
    """The sweep at the largest rate, and the rows on unseen seeds: at that rate, and each at its
    best.
    """
    task = TRAININGS[name]()
    steps = steps or task.steps
    sweeps, judged, chosen = {}, {}, {}
    for rate in task.rates:
        sweep = sweeps[rate] = tuned(task, rate, values, range(seeds), steps)
        value = sweep.recommended.value
        chosen[rate] = {
            "recommended": DEFAULT if np.isnan(value) else value,
            "default": DEFAULT,
            "no clip": np.inf,
        }
        judged[rate] = tuned(
            task, rate, list(chosen[rate].values()), range(100, 100 + unseen), steps
        )
    largest = max(task.rates)
    same = [
        line(task, largest, title, value, judged[largest])
        for title, value in chosen[largest].items()
    ]
    own = []
    for title in chosen[largest]:
        best = min(task.rates, key=lambda rate: score(sweeps[rate], chosen[rate][title]))
        own.append(line(task, best, title, chosen[best][title], judged[best]))
    return sweeps[largest], same, own


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["char_rnn", "cartpole", "transformer"], choices=TRAININGS
    )
    parser.add_argument("--seeds", type=int, default=3, help="to tune on")
    parser.add_argument("--unseen", type=int, default=10, help="to judge on")
    parser.add_argument("--steps", type=int, help="of every run; by default each task's own number")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--into", help="a document between whose markers the table is put")
    parser.add_argument("--picture", help="where to put a picture of the sweep of the first task")
    args = parser.parse_args(argv)
    values, same, own = (VALUES[4:6] if args.small else VALUES), [], []
    seeds, unseen, steps = (2, 2, 3) if args.small else (args.seeds, args.unseen, args.steps)
    for name in args.tasks:
        sweep, *found = measured(name, values, seeds, unseen, steps)
        print(f"{name}\n\n{sweep}\n", flush=True)
        same, own = same + found[0], own + found[1]
        if args.picture and name == args.tasks[0]:
            optaxclip.plots.plot_sweep(sweep).figure.savefig(args.picture, dpi=80)
    text = "\n".join(
        ["All at the largest rate:\n", HEAD, *same, "\nEach at its best rate:\n", HEAD, *own]
    )
    publish(text, args.into, "results")


if __name__ == "__main__":
    main()
