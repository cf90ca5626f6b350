"""What per-example clipping costs: `clipped_value_and_grad`, Optax, and a plain gradient.

    python -m tests.benchmarks.per_example [--small] [--models mlp cnn ...]

Prints a Markdown table. Speed is relative to `vmap(grad)` with Optax's clip: the median and
quartiles of ratios of consecutive runs, in an order that is reversed every other round. Memory is
what a step needs in addition to its arguments and results, by XLA's own account.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import optaxclip
from tests.benchmarks.reporting import describe_device, format_quartiles, publish, race, table

NO_CLIP = "no clip"


class Model(NamedTuple):
    """A loss of one example, its parameters, and a batch."""

    loss: object
    params: object
    batch: object


def make_model(net, inputs, labels):
    def loss(params, example):
        logits = net.apply(params, example[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, example[1]))

    params = jax.jit(net.init)(jax.random.key(0), inputs[0])
    return Model(loss, params, (inputs, labels))


class CNN(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        for i, width in enumerate((1, 2, 4, 4)):
            x = jax.nn.relu(linen.Conv(width * self.width, (3, 3), strides=1 if i == 0 else 2)(x))
        return linen.Dense(10)(jax.nn.relu(linen.Dense(4 * self.width)(x.reshape(-1))))


class Depthwise(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(self.width, (3, 3), strides=2)(x)
        for _ in range(2):
            x = linen.Conv(self.width, (3, 3), feature_group_count=self.width)(jax.nn.relu(x))
            x = linen.Conv(self.width, (1, 1))(x)
        return linen.Dense(10)(jnp.mean(x, (0, 1)))


class MLP(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = jax.nn.relu(linen.Dense(self.width)(x))
        return linen.Dense(10)(x)


class Transformer(linen.Module):
    vocabulary: int
    width: int

    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(self.vocabulary, self.width)(ids)
        x = x + self.param("positions", linen.initializers.normal(0.02), (len(ids), self.width))
        for _ in range(2):
            attend, mask = linen.MultiHeadDotProductAttention(4), linen.make_causal_mask(ids)
            x = x + attend(linen.LayerNorm()(x), mask=mask)
            hidden = jax.nn.gelu(linen.Dense(4 * self.width)(linen.LayerNorm()(x)))
            x = x + linen.Dense(self.width)(hidden)
        return linen.Dense(self.vocabulary)(linen.LayerNorm()(x))


class Bag(linen.Module):
    vocabulary: int
    width: int

    @linen.compact
    def __call__(self, ids):
        x = jnp.mean(linen.Embed(self.vocabulary, self.width)(ids), axis=0)
        return linen.Dense(10)(jax.nn.relu(linen.Dense(self.width)(x)))


def list_models(small: bool) -> dict:
    """Lists models by name, as functions, so that only the chosen ones are built."""
    rng = np.random.default_rng(0)
    n, width, words, length = (4, 32, 40, 4) if small else (128, 1024, 20000, 32)
    few, side, letters = max(n // 4, 4), 8 if small else 32, words // 10

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def choose(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape))

    def make_mlp():
        return make_model(MLP(width), draw(n, 784), choose(10, n))

    def make_cnn():
        return make_model(CNN(width // 32 or 4), draw(few, side, side, 3), choose(10, few))

    def make_depthwise():
        return make_model(Depthwise(width // 32 or 4), draw(few, side, side, 3), choose(10, few))

    def make_transformer():
        text = choose(letters, few, length)
        return make_model(Transformer(letters, width // 4), text, choose(letters, few, length))

    def make_embedding():
        return make_model(Bag(words, width // 8), choose(words, n, length), choose(10, n))

    models = {"mlp": make_mlp, "cnn": make_cnn, "depthwise": make_depthwise}
    return models | {"transformer": make_transformer, "embedding": make_embedding}


def list_steps(model: Model) -> dict:
    """Lists ways to take a step, `(params, batch) -> gradients`. The first is the reference."""

    def clip_by_optax(params, batch):
        losses, grads = jax.vmap(jax.value_and_grad(model.loss), (None, 0))(params, batch)
        flat, treedef = jax.tree.flatten(grads)
        return jnp.mean(losses), treedef.unflatten(optax.per_example_global_norm_clip(flat, 1.0)[0])

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(model.loss, (None, 0))(params, batch))

    clip = partial(optaxclip.clipped_value_and_grad, model.loss, 1.0, reduce="sum")
    ours = {f"microbatch {n}": clip(method="microbatch", microbatch_size=n) for n in (1, 8, 32)}
    ours |= {"ghost": clip(method="ghost"), NO_CLIP: jax.value_and_grad(mean_loss)}
    return {"vmap(grad), Optax's clip": clip_by_optax} | ours


def measure(model: Model, rounds: int) -> list[list[str]]:
    """Measures each way to take a step: its speed relative to the first one, and its memory."""
    args, compiled = (model.params, model.batch), {}
    for name, step in list_steps(model).items():
        compiled[name] = jax.jit(step).lower(*args).compile()
    _check_agreement({name: f(*args)[1] for name, f in compiled.items() if name != NO_CLIP})
    times = race({name: partial(f, *args) for name, f in compiled.items()}, rounds)
    first, plain, rows = next(iter(times.values())), times[NO_CLIP], []
    for name, t in times.items():
        megabytes = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
        speed, cost = format_quartiles(first / t), format_quartiles(t / plain)
        rows.append([name, speed, cost, f"{megabytes:.1f}"])
    return rows


def _check_agreement(results: dict) -> None:
    """Checks that all ways to clip give the same gradients."""
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    first, *others = results.values()
    for other in others:
        jax.tree.map(close, first, other)


def main(argv=None) -> None:
    """Prints the table, and writes it into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    models = ["mlp", "cnn", "depthwise", "transformer", "embedding"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--into", help="document to write the table into: docs/performance.md")
    args = parser.parse_args(argv)
    rows = []
    for name in args.models:
        model = list_models(args.small)[name]()
        count = f"{sum(x.size for x in jax.tree.leaves(model.params)):,}"
        rows += [[name, count, *row] for row in measure(model, 2 if args.small else args.rounds)]
    head = ["model", "parameters", "step", "speed", "time / no clip", "temporaries, MB"]
    text = f"Measured with {describe_device()}.\n\n{table(head, rows)}"
    publish(text, args.into, "per_example")


if __name__ == "__main__":
    main()
