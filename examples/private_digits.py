"""Differential privacy (DP-SGD): each person's gradient is clipped, then noise is added.

    uv run examples/private_digits.py

The clip bounds what one example can do to the sum of the gradients by `max_norm`. Gaussian noise of
`noise * max_norm` on that sum then hides it. T full-batch steps are (ε, δ)-differentially private
with ρ = T / (2 noise²) and ε = ρ + 2 √(ρ ln(1/δ)) (Bun and Steinke, 2016). Without a clip no amount
of noise is enough: the run without clip and noise shows, at its best rate, what privacy costs. A
bound that is too small shortens most gradients and biases the step; one that is too large adds
noise and nothing else. AUTO-S gives every example a norm of nearly 1 and has no bound to tune.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optaxclip
from comparison import Goal, Task, compare, parse_options
from data import load_digits

NOISE = 20.0  # standard deviation, relative to the bound
DELTA = 1e-4  # the probability with which the promise may fail

# name -> the bound of an example's gradient, and the action on it
METHODS = {
    "no clip, no noise": (np.inf, None),
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


def make_task(max_norm, action, people, held_out):
    """Trains the network on all people at each step."""
    graph, count = nnx.graphdef(MLP(nnx.Rngs(0))), len(people[1])
    # Without a clip no noise would hide a person, so there is none. The sum is divided by the bound
    # so that the rates of all methods are of the same order.
    deviation, scale = (NOISE * max_norm, max_norm) if np.isfinite(max_norm) else (0.0, 1.0)

    def loss_fn(params, person):
        image, label = person
        logits = nnx.merge(graph, params)(image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    clipped_grad = optaxclip.clipped_value_and_grad(loss_fn, max_norm, action=action, reduce="sum")

    def init(rate, key):
        return nnx.state(MLP(nnx.Rngs(key)), nnx.Param)

    def step(rate, params, key):
        (loss, examples), total = clipped_grad(params, people)
        noise = optax.tree.random_like(key, total)
        total = jax.tree.map(lambda t, n: t + deviation * n, total, noise)
        params = jax.tree.map(lambda p, t: p - rate * t / (count * scale), params, total)
        seen = {"loss": loss / count, "clip/grad_norm": jnp.median(examples.norms)}
        return params, seen | (report_share(examples.norms, max_norm) if action is None else {})

    def evaluate(params):
        logits = jax.vmap(nnx.merge(graph, params))(held_out[0])
        return jnp.mean(jnp.argmax(logits, axis=-1) == held_out[1])

    return Task(init, step, evaluate)


def report_share(norms, max_norm):
    """Reports to the table the share of people clipped, and whether the median one is."""
    share = jnp.mean(norms > max_norm)
    return {"clip/bound": max_norm, "clip/clipped": share > 0.5, "share clipped": share}


def compute_epsilon(steps):
    """Computes the ε of the whole run."""
    rho = steps / (2 * NOISE**2)
    return rho + 2 * np.sqrt(rho * np.log(1 / DELTA))


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=100, rates=(0.3, 1.0, 3.0, 10.0))
    epsilon = compute_epsilon(args.steps)
    print(f"All runs with noise are ({epsilon:.1f}, {DELTA:g})-differentially private.")
    goal = Goal("Accuracy on digits never seen", failed=0.5, higher=True)
    data = load_digits()
    tasks = {name: make_task(*method, *data) for name, method in METHODS.items()}
    return compare(tasks, goal, args)


if __name__ == "__main__":
    main()
