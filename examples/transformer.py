"""A small transformer that meets bad batches: from step 80 on, one in 40 is noise and weighs 1,000.

    uv run examples/transformer.py

Such batches are real: a corrupt shard, or a loss that was summed where all others were averaged.
Adam divides by the size of past gradients, so a bad batch does not move the parameters far. But it
makes the second moment a million times too large, and Adam all but stands still for hundreds of
steps. A smaller learning rate does not help. Three remedies are compared: a fixed bound, a bound
that follows the norms (ZClip), and skipping the whole step, moments included.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optaxclip
from comparison import Goal, compare, make_nnx_task, parse_options
from data import LETTERS, load_text, sample_windows

WIDTH, HEADS, LENGTH, BATCH = 32, 2, 32, 16

METHODS = {
    "no clip": lambda adam: optax.chain(optaxclip.clip_by(jnp.inf), adam),  # only measures
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


def loss_fn(model, rows):
    return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()


def spoil(key, rows, step):
    """Returns the batch and its weight: from step 80 on, one in 40 is noise and weighs 1,000."""
    chance, noise = jax.random.split(key)
    bad = jax.random.bernoulli(chance, 1 / 40) & (step >= 80)
    rows = jnp.where(bad, jax.random.randint(noise, rows.shape, 0, LETTERS), rows)
    return rows, jnp.where(bad, 1000.0, 1.0)


def make_task(method, text, held_out):
    """Trains the model with Adam and one of the methods."""

    def build(rate, rngs):
        model = Transformer(rngs)
        return model, nnx.Optimizer(model, method(optax.adam(rate)), wrt=nnx.Param)

    def train_step(model, optimizer, key):
        rows = sample_windows(text, key, BATCH, LENGTH)
        rows, weight = spoil(key, rows, optimizer.step[...])
        loss, grads = nnx.value_and_grad(lambda model: weight * loss_fn(model, rows))(model)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer.opt_state) | {"loss": loss / weight}

    def evaluate(model):
        return loss_fn(model, sample_windows(held_out, jax.random.key(99), 256, LENGTH))

    return make_nnx_task(build, train_step, evaluate)


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=250, rates=(1e-3, 4e-3, 16e-3))
    goal = Goal("Evaluation loss, nats per character", failed=3.0)
    text = load_text()
    return compare({name: make_task(method, *text) for name, method in METHODS.items()}, goal, args)


if __name__ == "__main__":
    main()
