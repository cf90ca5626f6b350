"""What the examples share: all methods, rates and seeds side by side, a table and a picture.

Nothing in here is about clipping. What to copy is in the examples.
"""

import argparse
import pathlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from tqdm import tqdm

SHOWN = "loss", "clip/grad_norm", "clip/clipped"  # by the progress bar
# Colours that colour-blind people tell apart; in grey print lines and marks differ.
LOOKS = (
    ("0.45", "-o"),
    ("#0072B2", "--s"),
    ("#D55E00", "-.^"),
    ("#009E73", ":d"),
    ("#CC79A7", "--v"),
)


class Task(NamedTuple):
    """A training as functions of arrays, so that many runs are one `vmap`; as `optaxclip.tune`
    takes them.

    Attributes:
      init: (rate, key) -> state.
      step: (rate, state, key) -> (state, seen), `seen` the metrics of the clip and what else is to
        be drawn.
      evaluate: state -> score.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[[jax.Array, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    evaluate: Callable[[Any], jax.Array]


class Goal(NamedTuple):
    """What is reported and drawn.

    Attributes:
      score: what the score is.
      failed: a run that ends worse than this has failed.
      higher: whether high is good.
    """

    score: str
    failed: float
    higher: bool = False


class Runs(NamedTuple):
    """What came of one method.

    Attributes:
      seen: what each step returned, (rates, seeds, steps): the metrics of a clip, the loss; "share
        clipped", if what is clipped are examples.
      scores: (rates, seeds).
    """

    seen: dict[str, np.ndarray]
    scores: np.ndarray


def nnx_task(build: Callable, train_step: Callable, evaluate: Callable) -> Task:
    """The task of objects, whose state is the arrays in them.

    Args:
      build: (rate, rngs) -> (model, optimizer).
      train_step: (model, optimizer, key) -> seen; changes the two.
      evaluate: model -> score.
    """

    def objects(rate, state):
        built = build(
            rate, nnx.Rngs(0)
        )  # for its structure: XLA drops the numbers, since nobody uses them
        nnx.update(built, state)
        return built

    def init(rate, key):
        return nnx.state(build(rate, nnx.Rngs(key)))

    def step(rate, state, key):
        model, optimizer = objects(rate, state)
        seen = train_step(model, optimizer, key)
        return nnx.state((model, optimizer)), seen

    return Task(init, step, lambda state: evaluate(objects(0.0, state)[0]))


def options(
    file: str,
    doc: str,
    argv: list[str] | None,
    *,
    steps: int,
    rates: tuple[float, ...],
    seeds: int = 3,
):
    """The options that all examples have."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help="of each run")
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each method at each rate")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(rates), help="learning rates"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="leave out the other methods of the table"
    )
    parser.add_argument(
        "--out", default=f"{pathlib.Path(file).stem}.png", help="where to put the picture"
    )
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace, methods: Collection[str]) -> list[str]:
    """The names of the methods to run."""
    if not set(args.only or ()) <= set(methods):
        raise SystemExit(f"--only takes some of {list(methods)}, got {args.only}.")
    return list(args.only or methods)


def compare(tasks: dict[str, Task], goal: Goal, args: argparse.Namespace) -> dict[str, Runs]:
    """Trains all, prints the table, draws the picture."""
    rates = sorted(args.rates)
    results = {
        name: train(name, tasks[name], rates, args.seeds, args.steps)
        for name in chosen(args, tasks)
    }
    print(report(results, rates, goal))
    draw(results, rates, goal, args.out)
    return results


def train(name: str, task: Task, rates: list[float], seeds: int, steps: int) -> Runs:
    """Trains a method at all rates with all seeds, side by side."""
    rate, seed = (
        x.ravel() for x in jnp.meshgrid(jnp.asarray(rates), jnp.arange(seeds), indexing="ij")
    )
    keys, history = jax.vmap(jax.random.key)(seed), []

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.vmap, in_axes=(0, 0, 0, None))
    def step(state, rate, key, i):
        state, seen = task.step(rate, state, jax.random.fold_in(key, i))
        return state, with_skips(seen)

    state = jax.jit(jax.vmap(task.init))(rate, keys)
    bar = tqdm(range(steps), desc=f"{name:>20}", unit="step")
    for i in bar:
        state, seen = step(state, rate, keys, i)
        history.append(seen)
        if i % 10 == 0:  # to read a number waits for the device
            bar.set_postfix(
                {key.split("/")[-1]: f"{seen[key][-1]:.3g}" for key in SHOWN if key in seen}
            )
    shape = (len(rates), seeds)
    scores = np.asarray(jax.jit(jax.vmap(task.evaluate))(state)).reshape(shape)
    history = jax.device_get(history)
    return Runs(
        {
            key: np.stack([seen[key] for seen in history], -1).reshape(*shape, -1)
            for key in history[0]
        },
        scores,
    )


def with_skips(seen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of a skip wrapper under the names of a clip's, too: the table and the picture
    read these.
    """
    if "skip/bound" not in seen:
        return seen
    norm, bound = seen["skip/grad_norm"], seen["skip/bound"]
    return {
        "clip/grad_norm": norm,
        "clip/bound": bound,
        "clip/clipped": (norm > bound).astype(norm.dtype),
    } | seen


def report(results: dict[str, Runs], rates: list[float], goal: Goal) -> str:
    """Two tables: all methods at the largest rate, then each at the rate of its best median."""
    best = {
        name: int(np.argmin(np.median(costs(runs, goal), axis=1))) for name, runs in results.items()
    }
    last = dict.fromkeys(results, len(rates) - 1)
    all_rates, seeds = (
        ", ".join(f"{rate:g}" for rate in rates),
        next(iter(results.values())).scores.shape[1],
    )
    return (
        f"\n{goal.score} ({'higher' if goal.higher else 'lower'} is better;"
        f" failed: worse than {goal.failed:.3g})\n\n"
        f"All at the same learning rate, {seeds} seeds:\n\n{table(results, rates, last, goal)}\n\n"
        f"Each at its best learning rate of {all_rates}:\n\n{table(results, rates, best, goal)}"
    )


def costs(runs: Runs, goal: Goal) -> np.ndarray:
    """The scores, the lower the better; infinite if not finite."""
    return np.where(np.isfinite(runs.scores), -runs.scores if goal.higher else runs.scores, np.inf)


def table(results: dict[str, Runs], rates: list[float], at: dict[str, int], goal: Goal) -> str:
    """One line a method, at one rate each."""
    sign = -1 if goal.higher else 1
    rows = [["", "rate", "median", "worst", "clipped", "failed"]]
    for name, runs in results.items():
        cost, clipped = (
            costs(runs, goal)[at[name]],
            runs.seen.get("share clipped", runs.seen.get("clip/clipped")),
        )
        numbers = [
            f"{rates[at[name]]:g}",
            f"{sign * np.median(cost):.3g}",
            f"{sign * cost.max():.3g}",
        ]
        share = "" if clipped is None else f"{clipped[at[name]].mean():.0%}"
        rows.append([name, *numbers, share, f"{np.sum(cost > sign * goal.failed)} of {cost.size}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def draw(results: dict[str, Runs], rates: list[float], goal: Goal, path: str) -> None:
    """Scores against rates: which method still works at which rate."""
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, ((name, runs), look) in enumerate(zip(results.items(), LOOKS, strict=False)):
        # Beside one another: bars at the same rate would hide each other.
        beside = np.array(rates) * 1.06 ** (i - (len(results) - 1) / 2)
        plot_scores(runs, beside, goal, ax, name, *look)
    sign = -1 if goal.higher else 1
    # Where none failed, the line would squeeze all that there is to see.
    if any((costs(runs, goal) > sign * goal.failed).any() for runs in results.values()):
        ax.axhline(goal.failed, color="0.6", linewidth=0.8, zorder=0)
        ax.text(1.01, goal.failed, "failed", transform=ax.get_yaxis_transform(), va="center")
    ax.set(xscale="log", xlabel="learning rate", ylabel=goal.score)
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside right center", frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    print(f"\nThe picture is in {path}.")


def plot_scores(
    runs: Runs, beside: np.ndarray, goal: Goal, ax: Any, name: str, color: str, style: str
) -> None:
    """The median over seeds, from the best to the worst; what failed lies on its line, alone."""
    sign = -1 if goal.higher else 1
    cost, edge = costs(runs, goal), sign * goal.failed
    score, lost = sign * np.minimum(cost, edge), np.median(cost, axis=1) > edge
    middle = np.median(score, axis=1)
    spread = np.stack([middle - score.min(axis=1), score.max(axis=1) - middle])
    look = {"color": color, "mfc": "white", "mew": 1.5}
    shown = np.where(lost, np.nan, middle)
    ax.errorbar(beside, shown, spread, fmt=style, capsize=2, label=name, **look)
    ax.plot(beside[lost], middle[lost], style[-1], **look)
