"""A policy gradient (REINFORCE) that keeps a pole upright, in plain JAX.

    uv run examples/cartpole.py

The gradient is a sum over an episode of what each action earned afterwards, so it grows with the
square of the time that the pole stood. The better the policy, the longer its gradients, and one
long step can undo it. With a clip the learning rate can suit the beginning, when gradients are
short. But the bound must fit: the 0.5 of many PPO implementations, which normalize their
advantages, is far too small for plain returns.

A step is an update from 16 episodes of at most 200 moves of 20 ms. The score is the mean length of
64 new episodes.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

import optaxclip
from comparison import Goal, Task, compare, parse_options

WIDTH, EPISODES, MOVES = 32, 16, 200
CLIPS = {
    "no clip": optaxclip.clip_by(jnp.inf),  # an infinite bound only measures
    "global norm 10": optaxclip.clip_by_global_norm(10.0),
    "global norm 0.5": optaxclip.clip_by_global_norm(0.5),  # as in many PPO implementations
    "10 % quantile": optaxclip.quantile_clip(0.1, init=None),  # of past norms
}


def init_policy(key):
    a, b = jax.random.split(key)
    return {
        "in": jax.random.normal(a, (4, WIDTH)) / 2,
        "out": 0.1 * jax.random.normal(b, (WIDTH, 2)) / WIDTH**0.5,
    }


def push(state, right):
    """Pushes a cart (1 kg) with a pole (0.1 kg, 0.5 m to its middle) by 10 N for 20 ms."""
    _, speed, angle, spin = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    thrust = (jnp.where(right, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
    twist = (9.8 * sine - cosine * thrust) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    return state + 0.02 * jnp.stack([speed, thrust - 0.05 * twist * cosine / 1.1, spin, twist])


def play(policy, key):
    """Plays an episode: the log-probability of each action, and 1 for each move before the fall."""

    def move(carry, key):
        state, up = carry
        logits = jnp.tanh(state @ policy["in"]) @ policy["out"]
        action = jax.random.categorical(key, logits)
        state = push(state, action == 1)
        still = up & (jnp.abs(state[0]) < 2.4) & (jnp.abs(state[2]) < 0.21)
        return (state, still), (jax.nn.log_softmax(logits)[action], up)

    start, rest = jax.random.split(key)
    state = jax.random.uniform(start, (4,), minval=-0.05, maxval=0.05)
    _, (log_probs, up) = lax.scan(move, (state, jnp.array(True)), jax.random.split(rest, MOVES))
    return log_probs, up.astype(jnp.float32)


def loss_fn(policy, key):
    """Returns a loss whose gradient is that of minus the expected return, and the mean length."""
    log_probs, up = jax.vmap(play, (None, 0))(policy, jax.random.split(key, EPISODES))
    to_go = jnp.cumsum(up[:, ::-1], axis=1)[:, ::-1]
    return -jnp.sum(log_probs * up * to_go) / EPISODES, up.sum(1).mean()


def make_task(clip):
    """Trains the policy by SGD with momentum, after the clip."""

    def make_tx(rate):
        return optax.chain(clip, optax.sgd(rate, momentum=0.9))

    def init(rate, key):
        policy = init_policy(key)
        return policy, make_tx(rate).init(policy)

    def step(rate, state, key):
        policy, opt_state = state
        (_, length), grads = jax.value_and_grad(loss_fn, has_aux=True)(policy, key)
        updates, opt_state = make_tx(rate).update(grads, opt_state, policy)
        seen = optaxclip.metrics(opt_state) | {"episode length": length}
        return (optax.apply_updates(policy, updates), opt_state), seen

    def evaluate(state):
        _, up = jax.vmap(play, (None, 0))(state[0], jax.random.split(jax.random.key(99), 64))
        return up.sum(1).mean()

    return Task(init, step, evaluate)


def main(argv=None):
    rates = (1e-5, 1e-4, 1e-3, 3e-3)
    args = parse_options(__file__, __doc__, argv, steps=100, rates=rates, seeds=5)
    goal = Goal("Episode length (at most 200)", failed=100, higher=True)
    return compare({name: make_task(clip) for name, clip in CLIPS.items()}, goal, args)


if __name__ == "__main__":
    main()
