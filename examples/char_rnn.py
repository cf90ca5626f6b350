"""A character model of Python source, without a clip, with a fixed clip and with an adaptive one.

    uv run examples/char_rnn.py

The text is the source of Python's own standard library, a megabyte of it, read from this machine.
The network is a plain tanh recurrent network, the optimizer SGD with momentum: the setting of the
paper that introduced clipping. It is chosen because it shows the effect: Adam divides by the size
of the gradient, and gated cells (LSTM, GRU) tame it, so both hide most of what a clip does. Without
a clip one would take a smaller learning rate; so every method runs at each of a grid of rates, and
is compared at the same rate and at its own best.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, nnx_task, options
from data import LETTERS, library_text, windows

HIDDEN, LENGTH, BATCH = 64, 64, 16

# 1.5 times the running mean of past norms, in which a spike counts as its bound, and never more
# than 1.
running_mean = optaxclip.thresholds.lag(
    optax.chain(optax.ema(0.95), optax.scale(1.5)), feed=optaxclip.feeds.clipped
)
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 1": optaxclip.clip_by_global_norm(1.0),
    "1.5 x the mean, capped": optaxclip.clip_by(optaxclip.thresholds.at_most(running_mean, 1.0)),
}


class CharRNN(nnx.Module):
    """A vanilla recurrent network, started orthogonal with a gain of 1.3: there gradients can
    explode.
    """

    def __init__(self, rngs):
        start = nnx.initializers.orthogonal(1.3)
        self.embed = nnx.Embed(LETTERS, HIDDEN, rngs=rngs)
        self.rnn = nnx.RNN(nnx.SimpleCell(HIDDEN, HIDDEN, recurrent_kernel_init=start, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, LETTERS, rngs=rngs)

    def __call__(self, text):
        return self.head(self.rnn(self.embed(text)))


def loss_of(model, text):
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:]).mean()


def task(clip, text, held_out):
    """The model, trained with a clip."""

    def build(rate, rngs):
        model = CharRNN(rngs)
        tx = optax.chain(clip, optax.sgd(rate, momentum=0.9))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train_step(model, optimizer, key):
        loss, grads = nnx.value_and_grad(loss_of)(model, windows(text, key, BATCH, LENGTH))
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss}

    def evaluate(model):
        return loss_of(model, windows(held_out, jax.random.key(99), 256, LENGTH))

    return nnx_task(build, train_step, evaluate)


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=400, rates=(0.05, 0.1, 0.2, 0.4))
    text, goal = library_text(), Goal("Evaluation loss, nats a character", failed=np.log(LETTERS))
    return compare({name: task(clip, *text) for name, clip in CLIPS.items()}, goal, args)


if __name__ == "__main__":
    main()
