"""Does the threshold that `optaxclip.tune` recommends beat the default, and no clip, on seeds that it never saw?

    uv run --extra test python -m tests.benchmarks.tuning [--into docs/tuning.md] [--picture docs/images/tuning.png]

Each task is tuned on three seeds, at one learning rate, and judged on ten others: other starts and other batches.
"""

import argparse
import pathlib
import re

import jax
import numpy as np
import optax

import optaxclip
from tests.benchmarks.trainings import TRAININGS, Training

VALUES = tuple(float(f"{value:.2g}") for value in np.geomspace(0.01, 1000, 11))
DEFAULT = 1.0
RATES = {"char_rnn": 1.0, "digits_cnn": 0.1, "cartpole": 1e-3, "transformer": 16e-3}


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


def tuned(task: Training, rate: float, values, seeds, steps: int) -> optaxclip.Sweep:
    step, init, evaluate = functions(task, rate)
    return optaxclip.tune(step, init, values, batches=range(steps), seeds=seeds, evaluate=evaluate, failed=task.failed)


def line(task: Training, rate: float, value: float, sweep: optaxclip.Sweep, wanted: float) -> str:
    """A row of the table: one threshold on the unseen seeds."""
    (at,) = np.flatnonzero(sweep.values == wanted)
    final = np.where(np.isnan(sweep.final[at]), np.inf, sweep.final[at])
    title = {value: f"recommended: {value:g}", np.inf: "no clip"}.get(wanted, f"default: {wanted:g}")
    lost = f"{sweep.diverged[at].sum()} of {final.size}"
    median = np.quantile(final, 0.5, method="higher")
    cells = [task.name, f"{rate:g}", title, f"{median:.3g}", f"{final.max():.3g}", f"{sweep.clip_rate[at]:.0%}", lost]
    return "| " + " | ".join(cells) + " |"


HEAD = """| task | rate | `max_norm` | median | worst | clipped | diverged |
|---|---|---|---|---|---|---|"""


def measured(name: str, values, seeds: int, unseen: int, steps: int | None) -> tuple[optaxclip.Sweep, list[str]]:
    """The sweep on the first seeds, and the rows for the recommended value, the default and no clip on the others."""
    task, rate = TRAININGS[name](), RATES[name]
    sweep = tuned(task, rate, values, range(seeds), steps or task.steps)
    value = sweep.recommended.value
    judged = [value if np.isfinite(value) else DEFAULT, DEFAULT]
    other = tuned(task, rate, judged, range(100, 100 + unseen), steps or task.steps)
    wanted = dict.fromkeys((judged[0], DEFAULT, np.inf))
    return sweep, [line(task, rate, judged[0], other, w) for w in wanted]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["char_rnn", "cartpole", "transformer"], choices=TRAININGS)
    parser.add_argument("--seeds", type=int, default=3, help="to tune on")
    parser.add_argument("--unseen", type=int, default=10, help="to judge on")
    parser.add_argument("--steps", type=int, help="of every run; by default each task's own number")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--into", help="a document between whose markers the table is put")
    parser.add_argument("--picture", help="where to put a picture of the sweep of the first task")
    args = parser.parse_args(argv)
    values, rows = (VALUES[::5], []) if args.small else (VALUES, [])
    seeds, unseen, steps = (2, 2, 3) if args.small else (args.seeds, args.unseen, args.steps)
    for name in args.tasks:
        sweep, found = measured(name, values, seeds, unseen, steps)
        print(f"{name}\n\n{sweep}\n", flush=True)
        rows += found
        if args.picture and name == args.tasks[0]:
            sweep.plot().figure.savefig(args.picture, dpi=80)
    text = "\n".join([HEAD, *rows])
    print(text)
    if args.into:
        document, new = pathlib.Path(args.into), f"<!-- results -->\n\n{text}\n\n<!-- end -->"
        old = document.read_text()
        document.write_text(re.sub("<!-- results -->.*<!-- end -->", lambda match: new, old, flags=re.DOTALL))


if __name__ == "__main__":
    main()
