"""A character model of Python source, trained without a clip, with a fixed clip and with an adaptive one.

    uv run --extra examples examples/char_rnn.py

The text is the source of Python's own standard library, a megabyte of it, read from this machine.  The network is a
plain tanh recurrent network, the optimizer SGD with momentum: the setting of the paper that introduced clipping.  It is
chosen because it shows the effect: Adam divides by the size of the gradient, and gated cells (LSTM, GRU) tame it, so
both hide most of what a clip does.  Without a clip one would take a smaller learning rate; so every method runs at each
of a grid of rates, and is compared at the same rate and at its own best.
"""

import argparse
import glob
import os
import sysconfig

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optaxclip

HIDDEN, LENGTH, BATCH, CHUNK = 64, 64, 16, 20
RATES = (0.05, 0.1, 0.2, 0.4)

# 1.5 times the running mean of past norms, in which a spike counts as its bound, and never more than 1.
running_mean = optaxclip.lag(optax.chain(optax.ema(0.95), optax.scale(1.5)), feed=optaxclip.clipped)
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 1": optaxclip.clip_by_global_norm(1.0),
    "1.5 x the mean": optaxclip.clip_by(optaxclip.at_most(running_mean, 1.0)),
}


def read_text(size=1_000_000):
    """The first megabyte of the standard library's source, as numbers from 0 to 127."""
    text = b""
    for name in sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py"))):
        with open(name, "rb") as file:
            text += file.read()
    return jnp.asarray(np.frombuffer(text[:size], np.uint8) & 127)


class CharRNN(nnx.Module):
    """A vanilla recurrent network, started orthogonal with a gain of 1.3: there gradients can explode."""

    def __init__(self, rngs):
        start = nnx.initializers.orthogonal(1.3)
        self.embed = nnx.Embed(128, HIDDEN, rngs=rngs)
        self.rnn = nnx.RNN(nnx.SimpleCell(HIDDEN, HIDDEN, recurrent_kernel_init=start, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, 128, rngs=rngs)

    def __call__(self, text):
        return self.head(self.rnn(self.embed(text)))


def loss_of(model, text):
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:]).mean()


def windows(text, key, count):
    """Random windows of the text."""
    starts = jax.random.randint(key, (count,), 0, len(text) - LENGTH)
    return text[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)


def trainer(clip, text):
    """Three functions of one run: start it, train it for a chunk of steps, evaluate it on text that it never saw."""
    train_text, eval_text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    def build(seed, rate):
        model = CharRNN(nnx.Rngs(jax.random.key(seed)))
        tx = optax.chain(clip, optax.trace(0.9), optax.scale(-1.0 * rate))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def start(seed, rate):
        return nnx.state(build(seed, rate))

    def advance(state, seed, rate, first_step):
        graph = nnx.graphdef(build(0, rate))

        def step(state, i):
            model, optimizer = nnx.merge(graph, state)
            batch = windows(train_text, jax.random.fold_in(jax.random.key(seed), i), BATCH)
            loss, grads = nnx.value_and_grad(loss_of)(model, batch)
            optimizer.update(model, grads)
            seen = optaxclip.metrics(optimizer.opt_state, prefix="") | {"loss": loss}
            return nnx.state((model, optimizer)), seen

        return jax.lax.scan(step, state, first_step + jnp.arange(CHUNK))

    def evaluate(state, rate):
        model, _ = nnx.merge(nnx.graphdef(build(0, rate)), state)
        return loss_of(model, windows(eval_text, jax.random.key(99), 256))

    return start, advance, evaluate


def train(name, text, seeds, rates, steps):
    """Trains all seeds at all rates side by side. Returns the history of each step and the final evaluation losses."""
    seed, rate = (x.ravel() for x in jnp.meshgrid(jnp.arange(seeds), jnp.asarray(rates), indexing="ij"))
    start, advance, evaluate = trainer(CLIPS[name], text)
    advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None)), donate_argnums=0)
    state, history = jax.jit(jax.vmap(start))(seed, rate), []
    with tqdm(total=steps, desc=f"{name:>16}", unit="step") as bar:
        for first in range(0, steps, CHUNK):
            state, seen = advance(state, seed, rate, first)
            history.append(jax.tree.map(lambda x: np.asarray(x).reshape(seeds, len(rates), -1), seen))
            last = {key: float(history[-1][key][0, -1, -1]) for key in ("loss", "grad_norm", "clipped_fraction")}
            bar.set_postfix_str("loss {loss:.2f}, norm {grad_norm:.3g}, {clipped_fraction:.0%} clipped".format(**last))
            bar.update(CHUNK)
    losses = np.asarray(jax.jit(jax.vmap(evaluate))(state, rate)).reshape(seeds, len(rates))
    joined = {key: np.concatenate([h[key] for h in history], axis=-1) for key in history[0]}
    return joined, np.where(np.isfinite(losses), losses, np.inf)


def row(title, history, losses, rates, column):
    """One line of the table: a method at one learning rate."""
    loss, clipped = losses[:, column], history["clipped_fraction"][:, column, -1]
    diverged = int(np.sum(loss > np.log(128)))  # worse than guessing among all characters
    cells = f"{title:<17} {rates[column]:>5} {np.median(loss):>8.2f} {loss.max():>8.2f} {np.mean(clipped):>8.0%}"
    return f"{cells} {diverged:>5}/{len(loss)}"


def report(results, rates):
    """The table: all at the same rate, then each at its best (by the median over seeds)."""
    head = f"{'':<17} {'rate':>5} {'median':>8} {'worst':>8} {'clipped':>8} {'diverged':>7}"
    print(
        f"\nEvaluation loss (nats a character; {np.log(128):.2f} is guessing)\n\nAll at the same learning rate\n{head}"
    )
    for name, (history, losses) in results.items():
        print(row(name, history, losses, rates, rates.index(max(rates))))
    print(f"\nEach at its best learning rate of {', '.join(map(str, rates))}\n{head}")
    for name, (history, losses) in results.items():
        print(row(name, history, losses, rates, int(np.argmin(np.median(losses, axis=0)))))


def draw(results, path):
    """Loss, and norm against bound with the clipped steps marked, of the first seed at the largest rate."""
    fig, axes = plt.subplots(2, len(results), figsize=(11, 5), sharex=True, sharey="row", layout="constrained")
    for (name, (history, _)), (top, bottom) in zip(results.items(), axes.T, strict=True):
        seen = {key: value[0, -1] for key, value in history.items()}
        steps = np.arange(len(seen["loss"]))
        clipped = seen["clipped"] > 0
        top.plot(steps, np.minimum(seen["loss"], 12), color="black", linewidth=0.8)
        top.set_title(name)
        bottom.semilogy(steps, seen["grad_norm"], color="0.6", linewidth=0.8, label="norm before the clip")
        if np.isfinite(seen["bound"][-1]):
            bottom.semilogy(steps, seen["bound"], color="black", linestyle="--", linewidth=1.2, label="bound")
        share = f"clipped: {clipped.mean():.0%} of steps"
        bottom.plot(steps[clipped], seen["grad_norm"][clipped], "x", color="black", markersize=3, label=share)
        bottom.set_xlabel("step")
        bottom.legend(loc="upper left", fontsize=8, framealpha=0.9)
    axes[0, 0].set_ylabel("training loss (cut at 12)")
    axes[1, 0].set_ylabel("gradient norm")
    fig.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description="A character model of Python source, with and without clipping.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--out", default="char_rnn.png")
    args = parser.parse_args(argv)
    text, rates = read_text(), sorted(args.rates)
    results = {name: train(name, text, args.seeds, rates, args.steps) for name in CLIPS}
    report(results, rates)
    draw(results, args.out)
    print(f"\nThe picture is in {args.out}.")
    return {name: losses for name, (_, losses) in results.items()}


if __name__ == "__main__":
    main()
