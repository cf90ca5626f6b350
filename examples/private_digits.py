"""Handwritten digits, learned privately: each person's gradient clipped, then noise for all.

    uv run examples/private_digits.py

Full-batch DP-SGD. Clipping bounds what one example can do to the sum of the gradients by
`max_norm`; Gaussian noise of `noise * max_norm` on that sum then hides it. T steps are (ε,
δ)-differentially private with ρ = T / (2 noise²) and ε = ρ + 2 √(ρ ln(1/δ)) (Bun and Steinke,
2016). Without a clip there is no bound, so no noise is enough: that run, at its best rate, shows
what privacy costs. Too small a bound shortens most gradients and biases the step, too large a one
buys nothing but noise; AUTO-S, which gives every example a length of nearly 1, has no bound to
tune.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, Task, compare, options
from data import digits

NOISE, DELTA = (
    20.0,
    1e-4,
)  # standard deviation of the noise, in bounds; how often the promise may fail

# name -> the bound of one example's gradient, and what is done about it
METHODS = {
    "no clip, no noise": (jnp.inf, None),
    "clip 0.1": (0.1, None),
    "clip 1": (1.0, None),
    "clip 10": (10.0, None),
    "AUTO-S": (1.0, optaxclip.per_example.auto_s()),
}


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(jnp.tanh(self.hidden(image.ravel())))


def task(max_norm, action, people, held_out):
    """The network, trained on all people at each step."""
    graph = nnx.graphdef(MLP(nnx.Rngs(0)))
    bound = (
        max_norm if np.isfinite(max_norm) else 0.0
    )  # without a bound no noise would do: there is none
    count = len(people[1])

    def loss_of(params, person):
        image, label = person
        return optax.softmax_cross_entropy_with_integer_labels(
            nnx.merge(graph, params)(image), label
        )

    def init(rate, key):
        return nnx.state(MLP(nnx.Rngs(key)), nnx.Param)

    def step(rate, params, key):
        clipped = optaxclip.clipped_value_and_grad(loss_of, max_norm, action=action, reduce="sum")
        (loss, examples), total = clipped(params, people)
        total = jax.tree.map(
            lambda t, n: t + NOISE * bound * n, total, optax.tree.random_like(key, total)
        )
        # The sum of bounded gradients is divided by their bound: the rates of all methods are then
        # of one order.
        params = jax.tree.map(lambda p, t: p - rate * t / (count * (bound or 1.0)), params, total)
        seen = {"loss": loss / count, "clip/grad_norm": jnp.median(examples.norms)}
        return params, seen | (clipped_share(examples.norms, max_norm) if action is None else {})

    def evaluate(params):
        logits = jax.vmap(nnx.merge(graph, params))(held_out[0])
        return jnp.mean(jnp.argmax(logits, axis=-1) == held_out[1])

    return Task(init, step, evaluate)


def clipped_share(norms, max_norm):
    """For table and picture: the share of people clipped, and whether the median one is."""
    share = jnp.mean(norms > max_norm)
    return {"clip/bound": max_norm, "clip/clipped": share > 0.5, "share clipped": share}


def epsilon(steps):
    """The ε of the whole run."""
    rho = steps / (2 * NOISE**2)
    return rho + 2 * np.sqrt(rho * np.log(1 / DELTA))


def main(argv=None):
    args = options(__file__, __doc__, argv, steps=100, rates=(0.3, 1.0, 3.0, 10.0))
    goal = Goal("Accuracy on digits never seen", failed=0.5, higher=True)
    print(f"All with noise are ({epsilon(args.steps):.1f}, {DELTA:g})-differentially private.")
    data = digits()
    return compare({name: task(*method, *data) for name, method in METHODS.items()}, goal, args)


if __name__ == "__main__":
    main()
