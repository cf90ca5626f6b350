"""What the examples share: all methods, rates and seeds run side by side, a table and a picture.

Nothing here is about clipping. Copy from the examples, not from this file.
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

SHOWN = "loss", "clip/grad_norm", "clip/clipped"  # next to the progress bar
# Colours that colour-blind people can tell apart. In grey print, lines and markers differ.
COLORS = "0.45", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
STYLES = "-o", "--s", "-.^", ":d", "--v"


class Task(NamedTuple):
    """A training as functions of arrays, so that many runs are one `vmap`, as in `optaxclip.tune`.

    Attributes:
      init: (rate, key) -> state.
      step: (rate, state, key) -> (state, seen), where `seen` holds the metrics of the clip and
        other scalars.
      evaluate: state -> score.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[[jax.Array, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    evaluate: Callable[[Any], jax.Array]


class Goal(NamedTuple):
    """The score that is reported and drawn.

    Attributes:
      score: its name.
      failed: a run that ends with a worse score has failed.
      higher: whether a higher score is better.
    """

    score: str
    failed: float
    higher: bool = False


class Runs(NamedTuple):
    """The runs of one method.

    Attributes:
      seen: what the steps returned, each (rates, seeds, steps): the metrics of a clip and the loss,
        or "share clipped" if examples are clipped.
      scores: (rates, seeds).
    """

    seen: dict[str, np.ndarray]
    scores: np.ndarray


def make_nnx_task(build: Callable, train_step: Callable, evaluate: Callable) -> Task:
    """Makes a task of Flax objects. Its state is the arrays in them.

    Args:
      build: (rate, rngs) -> (model, optimizer).
      train_step: (model, optimizer, key) -> seen; it updates the model and the optimizer.
      evaluate: model -> score.
    """

    def rebuild(rate, state):
        # Built for the structure only. XLA removes the initialization, which nothing uses.
        objects = build(rate, nnx.Rngs(0))
        nnx.update(objects, state)
        return objects

    def init(rate, key):
        return nnx.state(build(rate, nnx.Rngs(key)))

    def step(rate, state, key):
        model, optimizer = rebuild(rate, state)
        seen = train_step(model, optimizer, key)
        return nnx.state((model, optimizer)), seen

    return Task(init, step, lambda state: evaluate(rebuild(0.0, state)[0]))


def parse_options(
    file: str,
    doc: str,
    argv: list[str] | None,
    *,
    steps: int,
    rates: tuple[float, ...],
    seeds: int = 3,
) -> argparse.Namespace:
    """Parses the options that all examples have."""
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=show_defaults)
    add, picture = parser.add_argument, f"{pathlib.Path(file).stem}.png"
    add("--steps", type=int, default=steps, help="steps of each run")
    add("--seeds", type=int, default=seeds, help="runs of each method at each rate")
    add("--rates", type=float, nargs="+", default=list(rates), help="learning rates")
    add("--only", nargs="+", metavar="METHOD", help="run only these methods of the table")
    add("--out", default=picture, help="file for the picture")
    return parser.parse_args(argv)


def choose_methods(args: argparse.Namespace, methods: Collection[str]) -> list[str]:
    """Returns the names of the methods to run."""
    if not set(args.only or ()) <= set(methods):
        raise SystemExit(f"--only takes some of {list(methods)}, got {args.only}.")
    return list(args.only or methods)


def compare(tasks: dict[str, Task], goal: Goal, args: argparse.Namespace) -> dict[str, Runs]:
    """Trains all tasks, prints the tables and draws the picture."""
    rates, names = sorted(args.rates), choose_methods(args, tasks)
    results = {name: train(name, tasks[name], rates, args.seeds, args.steps) for name in names}
    print(format_report(results, rates, goal))
    draw(results, rates, goal, args.out)
    return results


def train(name: str, task: Task, rates: list[float], seeds: int, steps: int) -> Runs:
    """Trains a task at all rates with all seeds, side by side."""
    grid = jnp.meshgrid(jnp.asarray(rates), jnp.arange(seeds), indexing="ij")
    rate, seed = (x.ravel() for x in grid)
    keys, history = jax.vmap(jax.random.key)(seed), []

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.vmap, in_axes=(0, 0, 0, None))
    def step(state, rate, key, i):
        state, seen = task.step(rate, state, jax.random.fold_in(key, i))
        return state, rename_skips(seen)

    state = jax.jit(jax.vmap(task.init))(rate, keys)
    bar = tqdm(range(steps), desc=f"{name:>20}", unit="step")
    for i in bar:
        state, seen = step(state, rate, keys, i)
        history.append(seen)
        if i % 10 == 0:  # reading a number waits for the device
            shown = {key.split("/")[-1]: seen[key][-1] for key in SHOWN if key in seen}
            bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()})
    shape, history = (len(rates), seeds), jax.device_get(history)
    seen = {key: np.stack([row[key] for row in history], -1) for key in history[0]}
    scores = np.asarray(jax.jit(jax.vmap(task.evaluate))(state))
    return Runs({key: x.reshape(*shape, -1) for key, x in seen.items()}, scores.reshape(shape))


def rename_skips(seen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds the metrics of a skip wrapper under the names of a clip, which the tables read."""
    if "skip/bound" not in seen:
        return seen
    norm, bound = seen["skip/grad_norm"], seen["skip/bound"]
    clipped = (norm > bound).astype(norm.dtype)
    return {"clip/grad_norm": norm, "clip/bound": bound, "clip/clipped": clipped} | seen


def format_report(results: dict[str, Runs], rates: list[float], goal: Goal) -> str:
    """Formats two tables: all methods at the largest rate, and each at its best rate."""
    seeds = next(iter(results.values())).scores.shape[1]
    last = dict.fromkeys(results, len(rates) - 1)
    best = {name: find_best_rate(runs, goal) for name, runs in results.items()}
    better, worse = ("higher", "below") if goal.higher else ("lower", "above")
    return (
        f"\n{goal.score}: {better} is better, failed {worse} {goal.failed:.3g}.\n\n"
        f"All at the same learning rate, {seeds} seeds:\n\n"
        f"{format_table(results, rates, last, goal)}\n\n"
        f"Each at its best learning rate of {', '.join(f'{rate:g}' for rate in rates)}:\n\n"
        f"{format_table(results, rates, best, goal)}"
    )


def find_best_rate(runs: Runs, goal: Goal) -> int:
    """Finds the position of the rate with the best median."""
    return int(np.argmin(np.median(to_costs(runs, goal), axis=1)))


def to_costs(runs: Runs, goal: Goal) -> np.ndarray:
    """Turns scores into costs: lower is better, and what is not finite is infinite."""
    return np.where(np.isfinite(runs.scores), -runs.scores if goal.higher else runs.scores, np.inf)


def format_table(
    results: dict[str, Runs], rates: list[float], at: dict[str, int], goal: Goal
) -> str:
    """Formats a table with one row per method, each at one rate."""
    rows = [["", "rate", "median", "worst", "clipped", "failed"]]
    rows += [format_row(name, runs, rates, at[name], goal) for name, runs in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def format_row(name: str, runs: Runs, rates: list[float], at: int, goal: Goal) -> list[str]:
    """Formats the row of a method at one rate."""
    sign, costs = -1 if goal.higher else 1, to_costs(runs, goal)[at]
    clipped = runs.seen.get("share clipped", runs.seen.get("clip/clipped"))
    share = "" if clipped is None else f"{clipped[at].mean():.0%}"
    median, worst = sign * np.median(costs), sign * costs.max()
    failed = f"{np.sum(costs > sign * goal.failed)} of {costs.size}"
    return [name, f"{rates[at]:g}", f"{median:.3g}", f"{worst:.3g}", share, failed]


def draw(results: dict[str, Runs], rates: list[float], goal: Goal, path: str) -> None:
    """Draws scores against rates: which method still works at which rate."""
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    looks = zip(COLORS, STYLES, strict=True)
    for i, ((name, runs), look) in enumerate(zip(results.items(), looks, strict=False)):
        # Side by side, because bars at the same rate would hide each other.
        shifted = np.array(rates) * 1.06 ** (i - (len(results) - 1) / 2)
        plot_scores(runs, shifted, goal, ax, name, *look)
    sign = -1 if goal.higher else 1
    # If no run failed, the line would only squeeze the rest of the picture.
    if any((to_costs(runs, goal) > sign * goal.failed).any() for runs in results.values()):
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
    runs: Runs, rates: np.ndarray, goal: Goal, ax: Any, name: str, color: str, style: str
) -> None:
    """Plots the median over seeds, with bars from the worst to the best.

    A median that failed is a marker on the line of failure, not connected to the others.
    """
    sign = -1 if goal.higher else 1
    costs, limit = to_costs(runs, goal), sign * goal.failed
    scores, failed = sign * np.minimum(costs, limit), np.median(costs, axis=1) > limit
    middle = np.median(scores, axis=1)
    spread = np.stack([middle - scores.min(axis=1), scores.max(axis=1) - middle])
    look = {"color": color, "mfc": "white", "mew": 1.5}
    connected = np.where(failed, np.nan, middle)
    ax.errorbar(rates, connected, spread, fmt=style, capsize=2, label=name, **look)
    ax.plot(rates[failed], middle[failed], style[-1], **look)
