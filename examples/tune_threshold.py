"""Which threshold? Found by training at all of them side by side, and judged on new starts.

    uv run examples/tune_threshold.py

The task is the pole of cartpole.py, whose gradients are hundreds long: with the bound of 1 that so
many take by habit it is learned slowly, with none not for sure. `optaxclip.tune` compiles the train
step once for all thresholds and seeds, and recommends the middle of the best plateau, not the
luckiest value.
"""

import pathlib

import jax
import numpy as np
from tqdm import tqdm

import cartpole
import optaxclip
from comparison import Goal, compare, options

VALUES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TUNED_ON = range(100, 110)  # seeds; those that it is judged on count from 0


def tuned(rate, steps):
    """The sweep over thresholds at one learning rate."""

    def task(max_norm):
        return cartpole.task(optaxclip.clip_by_global_norm(max_norm))

    def init(max_norm, key):
        return task(max_norm).init(rate, key), key

    def step(max_norm, state, i):
        state, key = state
        state, seen = task(max_norm).step(rate, state, jax.random.fold_in(key, i))
        return (state, key), cartpole.MOVES - seen["episode length"]

    def evaluate(state):
        return cartpole.MOVES - task(1.0).evaluate(state[0])

    bar = tqdm(range(steps), desc=f"{'all thresholds':>20}", unit="step")
    return optaxclip.tune(
        step, init, VALUES, batches=bar, seeds=TUNED_ON, evaluate=evaluate, failed=100
    )


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=60, rates=(1e-4, 1e-3, 3e-3), seeds=10)
    sweep = tuned(max(args.rates), args.steps)
    value = sweep.recommended.value
    print(f"\nMoves that an episode lacks of 200, tuned on {len(TUNED_ON)} seeds\n\n{sweep}")
    picture = pathlib.Path(args.out).with_suffix(".sweep.png")
    ax = optaxclip.plots.plot_sweep(sweep)
    ax.set(xlabel="bound of the gradient norm", ylabel="moves missing of 200")
    ax.figure.savefig(picture, dpi=100)
    print(f"The picture of the sweep is in {picture}.\n")
    clips = {"no clip": np.inf, "1, by habit": 1.0, f"{value:g}, tuned": value}
    goal = Goal("Length of an episode, of at most 200", failed=100, higher=True)
    return compare(
        {name: cartpole.task(optaxclip.clip_by_global_norm(x)) for name, x in clips.items()},
        goal,
        args,
    )


if __name__ == "__main__":
    main()
