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

import optaxclip

SHOWN = "loss", "clip/grad_norm", "clip/clipped"  # by the progress bar
LINES = ("-o", "--s", "-.^", ":d", "-x")


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
      drawn: what to draw of each step, above the norms.
      norms: what the norms are of.
    """

    score: str
    failed: float
    higher: bool = False
    drawn: str = "loss"
    norms: str = "gradient norm"


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
    """Scores against rates; and each step of the first seed at the largest rate."""
    fig = plt.figure(figsize=(3.2 + 2 * len(results), 4.6), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[3.2, 2 * len(results)])
    plot_scores(results, rates, goal, left.subplots())
    axes = right.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    for (name, runs), top, bottom in zip(results.items(), *axes, strict=True):
        seen = {key: x[-1, 0] for key, x in runs.seen.items()}
        share = seen.get("clip/clipped", np.zeros(1))
        if np.any(
            (share > 0) & (share < 1)
        ):  # of units: the longest beside the smallest bound would say nothing
            seen = seen | {
                "clip/clipped": np.round(share),
                "clip/bound": np.full_like(share, np.inf),
            }
        top.plot(seen[goal.drawn], color="black", linewidth=0.9)
        top.set_title(name, fontsize=9)
        optaxclip.plots.plot_norms(seen, bottom)
        bottom.legend(fontsize=6, loc="upper right", framealpha=0.9)
        bottom.set_ylabel(goal.norms)
        bottom.label_outer()
    right.suptitle(f"One run each, at the rate {rates[-1]:g}", fontsize=10)
    axes[0, 0].set_ylabel(goal.drawn)
    cut_axes(results, goal, *axes[:, 0])
    fig.savefig(path, dpi=100)
    print(f"\nThe picture is in {path}.")


def cut_axes(results: dict[str, Runs], goal: Goal, top: Any, bottom: Any) -> None:
    """Cuts off what has exploded; leaves room for the legends."""
    if goal.drawn == "loss":
        start = next(iter(results.values())).seen["loss"][-1, 0, 0]
        low, high = top.get_ylim()
        top.set_ylim(low if high < 3 * start else 0, min(high, 3 * start))
    low, high = bottom.get_ylim()
    norms = np.stack([runs.seen["clip/grad_norm"][-1, 0] for runs in results.values()])
    high = min(high, 1e4 * np.median(norms[np.isfinite(norms)]))
    bottom.set_ylim(low, high * (high / low) ** 0.4)


def plot_scores(results: dict[str, Runs], rates: list[float], goal: Goal, ax: Any) -> None:
    """The median score over seeds against the rate, from the best to the worst; what failed is at
    the edge, alone.
    """
    sign = -1 if goal.higher else 1
    for i, ((name, runs), style) in enumerate(zip(results.items(), LINES, strict=False)):
        cost, beside = costs(runs, goal), np.array(rates) * 1.06 ** (i - len(results) / 2)
        score, lost = (
            sign * np.minimum(cost, sign * goal.failed),
            np.median(cost, axis=1) > sign * goal.failed,
        )
        middle = np.median(score, axis=1)
        spread = np.stack([middle - score.min(axis=1), score.max(axis=1) - middle])
        look = {"color": "black", "mfc": "white"}
        ax.errorbar(
            beside, np.where(lost, np.nan, middle), spread, fmt=style, capsize=2, label=name, **look
        )
        ax.plot(beside[lost], middle[lost], style[-1], **look)
    ax.set(xscale="log", xlabel="learning rate")
    ax.set_xticks(
        rates, [f"{rate:g}" for rate in rates], rotation=45, ha="right", rotation_mode="anchor"
    )
    ax.minorticks_off()
    ax.set_title(f"{goal.score}\n(cut at {goal.failed:.3g}: failed)", fontsize=10)
    ax.legend(fontsize=8)
