"""Handwritten digits, learned with differential privacy: each person's gradient clipped, then noise for all.

    uv run --extra examples examples/private_digits.py

Full-batch DP-SGD.  Clipping bounds what one example can do to the sum of the gradients by `max_norm`; Gaussian noise of
`noise * max_norm` on that sum then hides it.  T steps are (ε, δ)-differentially private with ρ = T / (2 noise²) and
ε = ρ + 2 √(ρ ln(1/δ)) (Bun and Steinke, 2016).  Without a clip there is no bound, so no noise is enough: that run, at
its best rate, shows what privacy costs.  Too small a bound shortens most gradients and biases the step, too large a one
buys nothing but noise; AUTO-S, which gives every example a length of nearly 1, has no bound to tune.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import optaxclip

TRAIN, DELTA = 1400, 1e-4
RATES = (0.3, 1.0, 3.0, 10.0)
# name -> the bound of one example's gradient, γ of AUTO-S
METHODS = {
    "no clip, no noise": (jnp.inf, None),
    "clip 0.1": (0.1, None),
    "clip 1": (1.0, None),
    "clip 10": (10.0, None),
    "AUTO-S": (1.0, 0.01),
}


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, pixels):
        return self.head(jnp.tanh(self.hidden(pixels)))


def digits():
    """Pixels from 0 to 1 and labels, in an order of their own."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return jnp.asarray(data.data[order] / 16, jnp.float32), jnp.asarray(data.target[order])


def trainer(gamma, noise, batch, held_out):
    """A start, a step and an evaluation; compiled once for all bounds, rates and seeds."""
    graph = nnx.graphdef(MLP(nnx.Rngs(0)))

    def loss(params, example):
        pixels, label = example
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(pixels), label)

    def start(seed):
        return nnx.state(MLP(nnx.Rngs(jax.random.key(seed))), nnx.Param)

    def step(params, seed, rate, i, max_norm):
        clipped = optaxclip.clipped_value_and_grad(loss, max_norm, gamma=gamma, reduce="sum")
        (_, examples), grads = clipped(params, batch)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), len(jax.tree.leaves(grads)))
        keys = jax.tree.structure(grads).unflatten(list(keys))
        bound = jnp.where(jnp.isfinite(max_norm), max_norm, 0)  # without a bound no noise would do: there is none
        noisy = jax.tree.map(lambda g, key: g + noise * bound * jax.random.normal(key, g.shape), grads, keys)
        # The sum of bounded gradients is divided by their bound: the rates of all methods are then of one order.
        scale = rate / (len(batch[1]) * jnp.where(bound > 0, bound, 1))
        return jax.tree.map(lambda p, g: p - scale * g, params, noisy), examples.norms

    def accuracy(params):
        return jnp.mean(jnp.argmax(nnx.merge(graph, params)(held_out[0]), axis=-1) == held_out[1])

    step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)), donate_argnums=0)
    return jax.jit(jax.vmap(start)), step, jax.jit(jax.vmap(accuracy))


def train(name, functions, seeds, rates, steps):
    """Trains all seeds at all rates side by side: accuracies, (seeds, rates), and norms at the first and last step."""
    seed, rate = (x.ravel() for x in jnp.meshgrid(jnp.arange(seeds), jnp.asarray(rates), indexing="ij"))
    start, step, accuracy = functions
    params, norms = start(seed), []
    for i in tqdm(range(steps), desc=f"{name:>17}", unit="step"):
        params, seen = step(params, seed, rate, i, METHODS[name][0])
        norms += [np.asarray(seen[0])] if i in (0, steps - 1) else []
    return np.asarray(accuracy(params)).reshape(seeds, len(rates)), (norms[0], norms[-1])


def epsilon(steps, noise):
    """The ε of the whole run at δ = 1e-4."""
    rho = steps / (2 * noise**2)
    return rho + 2 * np.sqrt(rho * np.log(1 / DELTA))


def report(results, rates, steps, noise):
    print(f"\nAccuracy on digits never seen; privacy with noise {noise:g} over {steps} steps\n")
    print(f"{'':<18} {'epsilon':>8} {'best rate':>9} {'median':>7} {'worst':>7}")
    for name, (scores, _) in results.items():
        best = int(np.argmax(np.median(scores, axis=0)))
        spent = "none" if name.endswith("no noise") else f"{epsilon(steps, noise):.1f}"
        median, worst = np.median(scores[:, best]), scores[:, best].min()
        print(f"{name:<18} {spent:>8} {rates[best]:>9g} {median:>7.1%} {worst:>7.1%}")


def draw(results, rates, path):
    """Accuracy against rate for each method, and the norms of single examples with the bounds."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, (scores, _)), style in zip(results.items(), ("-o", "--s", "-.^", ":d", "-x"), strict=False):
        left.semilogx(rates, np.median(scores, axis=0), style, color="black", label=name, markerfacecolor="white")
    left.set(xlabel="learning rate", ylabel="accuracy, median over seeds")
    left.legend(fontsize=8)
    first, last = next(iter(results.values()))[1]
    bins = np.geomspace(max(min(first.min(), last.min()), 1e-4), max(first.max(), last.max()), 40)
    right.hist(first, bins, color="0.8", edgecolor="black", label="first step")
    right.hist(last, bins, histtype="step", color="black", hatch="//", label="last step, no clip")
    for bound in sorted({m for m, gamma in METHODS.values() if gamma is None and np.isfinite(m)}):
        right.axvline(bound, color="black", linestyle="--", linewidth=1)
        right.text(bound, 1, f"{bound:g}", transform=right.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    right.set(xscale="log", xlabel="norm of one example's gradient (dashed: the bounds)", ylabel="examples")
    right.legend(fontsize=8, loc="upper left")
    fig.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Digits learned with differential privacy, by per-example clipping.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=20.0, help="standard deviation of the noise, in bounds")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--out", default="private_digits.png")
    args = parser.parse_args(argv)
    (pixels, labels), rates = digits(), sorted(args.rates)
    batch, held_out = (pixels[:TRAIN], labels[:TRAIN]), (pixels[TRAIN:], labels[TRAIN:])
    functions = {gamma: trainer(gamma, args.noise, batch, held_out) for _, gamma in METHODS.values()}
    results = {name: train(name, functions[METHODS[name][1]], args.seeds, rates, args.steps) for name in METHODS}
    report(results, rates, args.steps, args.noise)
    draw(results, rates, args.out)
    print(f"\nThe picture is in {args.out}.")
    return {name: scores for name, (scores, _) in results.items()}


if __name__ == "__main__":
    main()
