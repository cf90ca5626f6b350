"""A small transformer that meets bad batches: from step 80 on one in 40 is noise, and weighs 1,000.

    uv run examples/transformer.py

Such batches are real: a corrupt shard, a loss that was summed where all others were averaged. Adam
divides by the size of past gradients, so one of them does not throw the parameters far; but it
makes the second moment a million times too large, and for hundreds of steps Adam all but stands
still. A smaller learning rate does not help. Three ways out: a fixed bound, a bound that follows
the norms (ZClip), and to leave the whole step out, moments and all.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, nnx_task, options
from data import LETTERS, library_text, windows

WIDTH, HEADS, LENGTH, BATCH = 32, 2, 32, 16

METHODS = {
    "no clip": lambda adam: optax.chain(
        optaxclip.clip_by(jnp.inf), adam
    ),  # an infinite bound only measures
    "global norm 1": lambda adam: optax.chain(optaxclip.clip_by_global_norm(1.0), adam),
    "ZClip": lambda adam: optax.chain(optaxclip.zclip(), adam),
    "skip 20 x the mean": lambda adam: optaxclip.skip_spikes(
        adam, optaxclip.thresholds.running(20.0, feed=optaxclip.feeds.accepted)
    ),
}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(LETTERS, WIDTH, rngs=rngs)
        self.place = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, LETTERS, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text) + self.place[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model, rows):
    return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()


def bad_or_not(key, rows, step):
    """The batch and its weight: from step 80 on one in 40 is noise, and weighs 1,000."""
    chance, noise = jax.random.split(key)
    bad = jax.random.bernoulli(chance, 1 / 40) & (step >= 80)
    return jnp.where(bad, jax.random.randint(noise, rows.shape, 0, LETTERS), rows), jnp.where(
        bad, 1000.0, 1.0
    )


def task(method, text, held_out):
    """The model, trained with Adam and a clip."""

    def build(rate, rngs):
        model = Transformer(rngs)
        return model, nnx.Optimizer(model, method(optax.adam(rate)), wrt=nnx.Param)

    def train_step(model, optimizer, key):
        rows, weight = bad_or_not(key, windows(text, key, BATCH, LENGTH), optimizer.step[...])
        loss, grads = nnx.value_and_grad(lambda model: weight * loss_of(model, rows))(model)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss / weight}

    def evaluate(model):
        return loss_of(model, windows(held_out, jax.random.key(99), 256, LENGTH))

    return nnx_task(build, train_step, evaluate)


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=250, rates=(1e-3, 4e-3, 16e-3))
    text, goal = library_text(), Goal("Evaluation loss, nats a character", failed=3.0)
    return compare({name: task(method, *text) for name, method in METHODS.items()}, goal, args)


if __name__ == "__main__":
    main()
