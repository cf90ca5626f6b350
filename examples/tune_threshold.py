"""Which threshold? One sweep trains with all of them side by side; new seeds judge the choice.

    uv run examples/tune_threshold.py

The task is the pole of cartpole.py, whose gradients have norms in the hundreds. With the usual
bound of 1 it learns slowly, and without a clip some runs fail. `optaxclip.tune` compiles the train
step once for all thresholds and seeds. It recommends the middle of the best plateau, not the
luckiest value.
"""

import pathlib

import jax
import numpy as np
from tqdm import tqdm

import cartpole
import optaxclip
from comparison import Goal, compare, parse_options

VALUES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TUNED_ON = range(100, 110)  # seeds; those that judge count from 0


def tune_bound(rate, steps):
    """Sweeps over the bounds at one learning rate."""

    def make_task(max_norm):
        return cartpole.make_task(optaxclip.clip_by_global_norm(max_norm))

    def init(max_norm, key):
        return make_task(max_norm).init(rate, key), key

    def step(max_norm, state, i):
        state, key = state
        state, seen = make_task(max_norm).step(rate, state, jax.random.fold_in(key, i))
        return (state, key), cartpole.MOVES - seen["episode length"]

    def evaluate(state):
        return cartpole.MOVES - make_task(1.0).evaluate(state[0])

    bar = tqdm(range(steps), desc=f"{'all thresholds':>20}", unit="step")
    return optaxclip.tune(
        step, init, VALUES, batches=bar, seeds=TUNED_ON, evaluate=evaluate, failed=100
    )


def draw_sweep(sweep, path):
    ax = optaxclip.plots.plot_sweep(sweep)
    ax.set(xlabel="bound of the gradient norm", ylabel="moves missing of 200")
    ax.figure.savefig(path, dpi=100)
    print(f"The picture of the sweep is in {path}.\n")


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=60, rates=(1e-4, 1e-3, 3e-3), seeds=10)
    sweep = tune_bound(max(args.rates), args.steps)
    print(f"\nMoves missing of 200, tuned on {len(TUNED_ON)} seeds\n\n{sweep}")
    draw_sweep(sweep, pathlib.Path(args.out).with_suffix(".sweep.png"))
    value = sweep.recommended.value
    bounds = {"no clip": np.inf, "1, by habit": 1.0, f"{value:g}, tuned": value}
    clips = {name: optaxclip.clip_by_global_norm(bound) for name, bound in bounds.items()}
    goal = Goal("Episode length (at most 200)", failed=100, higher=True)
    return compare({name: cartpole.make_task(clip) for name, clip in clips.items()}, goal, args)


if __name__ == "__main__":
    main()
