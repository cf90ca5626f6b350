"""Series of gradients that poison statistics, and the time a clip takes to recover."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip as oc

START = 100  # the step at which a series goes wrong


class Poison(NamedTuple):
    """What happens to a run.

    Attributes:
      first: the first step that is not as it was.
      last: the last one; the run is judged from the step after it.
      factor: what gradients are multiplied by, from `first` to `last`.
      lasting: what they are multiplied by from then on.
    """

    first: int
    last: int
    factor: float
    lasting: float = 1.0


POISONS = {
    "1 NaN": Poison(START, START, np.nan),
    "10 NaN": Poison(START, START + 9, np.nan),
    "200 NaN": Poison(START, START + 199, np.nan),
    "NaN first": Poison(0, 9, np.nan),
    "infinity": Poison(START, START, np.inf),
    "50 zeros": Poison(START, START + 49, 0.0),
    "50 zeros first": Poison(0, 49, 0.0),
    "spike 1e6": Poison(START, START, 1e6),
    "spike 1e6 first": Poison(0, 0, 1e6),
    "rise 100": Poison(START, START, 100.0, 100.0),
    "fall 100": Poison(START, START, 0.01, 0.01),
}


def factors(poison: Poison, steps: int) -> np.ndarray:
    step = np.arange(steps)
    out = np.where(step > poison.last, poison.lasting, 1.0)
    return np.where((step >= poison.first) & (step <= poison.last), poison.factor, out).astype(
        np.float32
    )


def gradients(steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A run of gradients of two leaves: directions that share a mean, log-normal lengths, the
    second leaf ten times.
    """
    rng = np.random.default_rng(seed)
    shapes = {"a": (3,), "b": (2, 2)}
    run = {}
    for i, (name, shape) in enumerate(shapes.items()):
        x = rng.normal(size=(steps, *shape)) + 0.5
        lengths = np.exp(0.3 * rng.normal(size=steps)) * 10.0**i
        flat = x.reshape(steps, -1)
        run[name] = (flat / np.linalg.norm(flat, axis=1, keepdims=True) * lengths[:, None]).reshape(
            x.shape
        )
    return {name: x.astype(np.float32) for name, x in run.items()}


def bounds_of(tx, run, factor) -> tuple[jax.Array, jax.Array]:
    """The bounds of all blocks over a run, and whether the last state is free of NaN."""
    params = {name: jnp.ones(x.shape[1:]) for name, x in run.items()}

    def step(state, now):
        grads, factor = now
        _, state = tx.update(jax.tree.map(lambda g: g * factor, grads), state, params)
        found = oc.metrics(state, prefix="")
        return state, jnp.stack(
            [value for name, value in found.items() if name.split("/")[0] == "bound"]
        )

    state, bounds = jax.lax.scan(step, tx.init(params), (run, factor))
    return bounds, jnp.array([~jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(state)]).all()


def steps_to_recover(
    tx: optax.GradientTransformation, steps: int, relative: bool = False
) -> dict[str, tuple[float, bool]]:
    """For each poison: after how many steps all bounds stay near the clean run's, and whether no
    NaN is in the state.

    Near is within a factor of 3. All runs are one compiled program.

    Args:
      tx: the clip.
      steps: the length of a run.
      relative: whether the bound does not depend on the scale of gradients.
    """
    run = jax.tree.map(jnp.asarray, gradients(steps))
    series = jnp.stack(
        [jnp.ones(steps), *(jnp.asarray(factors(p, steps)) for p in POISONS.values())]
    )
    bounds, sound = jax.jit(jax.vmap(lambda factor: bounds_of(tx, run, factor)))(series)
    out = {}
    for i, (name, poison) in enumerate(POISONS.items(), start=1):
        clean = np.asarray(bounds[0]) * (1 if relative else poison.lasting)
        out[name] = near(np.asarray(bounds[i]), clean, poison), bool(sound[i])
    return out


def near(bounds: np.ndarray, clean: np.ndarray, poison: Poison) -> float:
    """After how many steps from the end of the poison on all bounds stay within a factor of 3 of
    those of a clean run.

    Args:
      bounds, clean: (steps, blocks).
      poison: when it ended.
    """
    free = np.isinf(bounds) & np.isinf(clean)
    ratio = np.where(free, 1, bounds) / np.where(free, 1, clean)
    wrong = np.flatnonzero(~np.all((ratio < 3) & (ratio > 1 / 3), axis=-1))
    late = wrong[-1] + 1 if len(wrong) else 0
    return np.inf if late >= len(bounds) else max(0, int(late) - poison.last - 1)
