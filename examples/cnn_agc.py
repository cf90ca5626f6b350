"""A residual network without normalization on images: adaptive gradient clipping (AGC) by unit.

    uv run examples/cnn_agc.py

Without batch normalization nothing keeps the activations in range, and at a large learning rate
the first steps destroy such a network. AGC lets no unit move by more than a share of its own
weights. The paper excludes the last, linear layer, whose weights are small: clipped as well, it
learns slowly. The network is in Flax linen, like most published NFNets. The images are
scikit-learn's digits, 8 x 8 pixels.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optaxclip
from comparison import Goal, Task, compare, parse_options
from data import load_digits

WIDTH, DEPTH, BATCH = 12, 4, 32
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 1": optaxclip.clip_by_global_norm(1.0),
    "AGC, all layers": optaxclip.adaptive_grad_clip(0.02),
    "AGC, not the head": optaxclip.adaptive_grad_clip(0.02, exclude="^head/"),
}


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        start = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        x = nn.Conv(WIDTH, (3, 3), name="stem")(x)
        for i in range(DEPTH):
            x = x + nn.Conv(WIDTH, (3, 3), kernel_init=start, name=f"block_{i}")(nn.relu(x))
        return nn.Dense(10, name="head")(x.mean((-3, -2)))


def loss_fn(params, images, labels):
    logits = ResNet().apply({"params": params}, images[..., None])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_task(clip, steps, train, held_out):
    """Trains the network by SGD with momentum and a cosine schedule, after the clip."""
    images, labels = train

    def make_tx(rate):
        return optax.chain(clip, optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9))

    def init(rate, key):
        params = ResNet().init(key, images[:1, ..., None])["params"]
        return params, make_tx(rate).init(params)

    def step(rate, state, key):
        params, opt_state = state
        batch = jax.random.randint(key, (BATCH,), 0, len(labels))
        loss, grads = jax.value_and_grad(loss_fn)(params, images[batch], labels[batch])
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        seen = optaxclip.metrics(opt_state) | {"loss": loss}
        return (optax.apply_updates(params, updates), opt_state), seen

    def evaluate(state):
        logits = ResNet().apply({"params": state[0]}, held_out[0][..., None])
        return jnp.mean(jnp.argmax(logits, -1) == held_out[1])

    return Task(init, step, evaluate)


def main(argv=None):
    args = parse_options(__file__, __doc__, argv, steps=200, rates=(0.03, 0.1, 0.3, 1.0))
    goal = Goal("Accuracy on digits never seen", failed=0.5, higher=True)
    data = load_digits()
    tasks = {name: make_task(clip, args.steps, *data) for name, clip in CLIPS.items()}
    return compare(tasks, goal, args)


if __name__ == "__main__":
    main()
