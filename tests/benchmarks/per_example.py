"""What per-example clipping costs: `clipped_value_and_grad`, Optax, and a plain gradient.

    python -m tests.benchmarks.per_example [--small] [--models mlp cnn ...]

Prints a markdown table. Speed is relative to `vmap(grad)` and Optax's clip: the median and the
quartiles of ratios of runs that followed each other, in an order that is reversed every other
round. Memory is XLA's own account of what a step needs beside its arguments and results.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import optaxclip
from tests.benchmarks.reporting import device, publish, quartiles, race, table


class Model(NamedTuple):
    """A loss of one example, its parameters, and a batch."""

    loss: object
    params: object
    batch: object


def _cross_entropy(logits, label):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))


def model_of(net, inputs, labels):
    params = jax.jit(net.init)(jax.random.key(0), inputs[0])
    return Model(
        lambda p, example: _cross_entropy(net.apply(p, example[0]), example[1]),
        params,
        (inputs, labels),
    )


class CNN(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        for i, width in enumerate((1, 2, 4, 4)):
            x = jax.nn.relu(linen.Conv(width * self.width, (3, 3), strides=1 if i == 0 else 2)(x))
        return linen.Dense(10)(jax.nn.relu(linen.Dense(4 * self.width)(x.reshape(-1))))


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
            x = x + linen.MultiHeadDotProductAttention(4)(
                linen.LayerNorm()(x), mask=linen.make_causal_mask(ids)
            )
            x = x + linen.Dense(self.width)(
                jax.nn.gelu(linen.Dense(4 * self.width)(linen.LayerNorm()(x)))
            )
        return linen.Dense(self.vocabulary)(linen.LayerNorm()(x))


class Bag(linen.Module):
    vocabulary: int
    width: int

    @linen.compact
    def __call__(self, ids):
        x = jnp.mean(linen.Embed(self.vocabulary, self.width)(ids), axis=0)
        return linen.Dense(10)(jax.nn.relu(linen.Dense(self.width)(x)))


def models(small: bool) -> dict:
    """What each name stands for: a function, so that only what is asked for is built."""
    rng = np.random.default_rng(0)
    n, width, words, length = (4, 32, 40, 4) if small else (128, 1024, 20000, 32)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def whole(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape))

    text, side = max(n // 4, 4), 8 if small else 32
    return {
        "mlp": lambda: model_of(MLP(width), normal(n, 784), whole(10, n)),
        "cnn": lambda: model_of(
            CNN(width // 32 or 4), normal(text, side, side, 3), whole(10, text)
        ),
        "transformer": lambda: model_of(
            Transformer(words // 10, width // 4),
            whole(words // 10, text, length),
            whole(words // 10, text, length),
        ),
        "embedding": lambda: model_of(
            Bag(words, width // 8), whole(words, n, length), whole(10, n)
        ),
    }


def steps(model: Model) -> dict:
    """The ways to take a step, each `(params, batch) -> gradients`; the first is what the others
    are compared with.
    """

    def of_optax(params, batch):
        losses, grads = jax.vmap(jax.value_and_grad(model.loss), (None, 0))(params, batch)
        flat, treedef = jax.tree.flatten(grads)
        return jnp.mean(losses), treedef.unflatten(optax.per_example_global_norm_clip(flat, 1.0)[0])

    def plain(params, batch):
        return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(model.loss, (None, 0))(p, batch)))(
            params
        )

    def of_ours(**kwargs):
        return optaxclip.clipped_value_and_grad(model.loss, 1.0, reduce="sum", **kwargs)

    ours = {f"microbatch {n}": of_ours(method="microbatch", microbatch_size=n) for n in (1, 8, 32)}
    return {
        "vmap(grad), Optax's clip": of_optax,
        **ours,
        "ghost": of_ours(method="ghost"),
        "no clip": plain,
    }


def measured(model: Model, rounds: int) -> list[list[str]]:
    """Per way of taking a step: its speed relative to the first way, and its memory in MB."""
    compiled = {
        name: jax.jit(f).lower(model.params, model.batch).compile()
        for name, f in steps(model).items()
    }
    _agree(
        {name: f(model.params, model.batch)[1] for name, f in compiled.items() if name != "no clip"}
    )
    runs = {name: lambda f=f: f(model.params, model.batch) for name, f in compiled.items()}
    times = race(runs, rounds)
    first, plain = next(iter(times.values())), times["no clip"]
    memory = {name: f.memory_analysis().temp_size_in_bytes / 1e6 for name, f in compiled.items()}
    return [
        [name, quartiles(first / t), quartiles(t / plain), f"{memory[name]:.1f}"]
        for name, t in times.items()
    ]


def _agree(results: dict) -> None:
    """All ways of clipping give the same gradients."""
    first, *others = results.values()
    for other in others:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), first, other
        )


def main(argv=None) -> None:
    """Prints the table, and puts it into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="tiny models, two rounds: to see that it runs"
    )
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "transformer", "embedding"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--into", help="a document between whose marks the table is put: docs/performance.md"
    )
    args = parser.parse_args(argv)
    rows = []
    for name in args.models:
        model = models(args.small)[name]()
        count = f"{sum(x.size for x in jax.tree.leaves(model.params)) / 1e6:.2f} M"
        rows += [[name, count, *row] for row in measured(model, 2 if args.small else args.rounds)]
    head = ["model", "parameters", "step", "speed", "time / no clip", "temporaries, MB"]
    text = f"Measured with {device()}.\n\n{table(head, rows)}"
    publish(text, args.into, "per_example")


if __name__ == "__main__":
    main()
