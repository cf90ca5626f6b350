"""A character model of Python source: without a clip, with a fixed bound, with an adaptive one.

    uv run examples/char_rnn.py

The text is a megabyte of Python's standard library, read from this machine. The network is a plain
tanh recurrent network trained by SGD with momentum, the setting of the paper that introduced
clipping by norm. Other settings hide most of what a clip does: Adam divides by the size of the
gradient, and gated cells (LSTM, GRU) keep it small. Without a clip one would lower the learning
rate. So each method runs at several rates, and is compared at the same rate and at its own best.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, make_nnx_task, parse_options
from data import LETTERS, load_text, sample_windows

HIDDEN, LENGTH, BATCH = 64, 64, 16

# 1.5 times the running mean of past norms. A spike enters the mean as its bound.
running_mean = optaxclip.thresholds.lag(
    optax.chain(optax.ema(0.95), optax.scale(1.5)), feed=optaxclip.feeds.clipped
)
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 1": optaxclip.clip_by_global_norm(1.0),
    "1.5 x the mean, capped": optaxclip.clip_by(optaxclip.thresholds.at_most(running_mean, 1.0)),
}


class CharRNN(nnx.Module):
    """A plain recurrent network, initialized so that gradients can explode."""

    def __init__(self, rngs):
        start = nnx.initializers.orthogonal(1.3)
        self.embed = nnx.Embed(LETTERS, HIDDEN, rngs=rngs)
        self.rnn = nnx.RNN(nnx.SimpleCell(HIDDEN, HIDDEN, recurrent_kernel_init=start, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, LETTERS, rngs=rngs)

    def __call__(self, text):
        return self.head(self.rnn(self.embed(text)))


def loss_fn(model, text):
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:]).mean()


def make_task(clip, text, held_out):
    """Trains the network by SGD with momentum, after the clip."""

    def build(rate, rngs):
        model = CharRNN(rngs)
        tx = optax.chain(clip, optax.sgd(rate, momentum=0.9))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train_step(model, optimizer, key):
        batch = sample_windows(text, key, BATCH, LENGTH)
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss}

    def evaluate(model):
        return loss_fn(model, sample_windows(held_out, jax.random.key(99), 256, LENGTH))

    return make_nnx_task(build, train_step, evaluate)


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=400, rates=(0.05, 0.1, 0.2, 0.4))
    goal = Goal("Evaluation loss, nats per character", failed=np.log(LETTERS))
    text = load_text()
    return compare({name: make_task(clip, *text) for name, clip in CLIPS.items()}, goal, args)


if __name__ == "__main__":
    main()
