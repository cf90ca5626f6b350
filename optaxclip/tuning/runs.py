"""Runs a sweep side by side, in one compiled program: `vmap` of the user's own train step.

The value is a tracer there, so any number that a clip takes can be swept, and nothing is compiled
twice. The steps are a Python loop: a `lax.scan` over steps would need all batches at once, and is
slow on a CPU if the step has a convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import validate
from optaxclip.base import Metrics
from optaxclip.monitoring.reading import find_parts
from optaxclip.record import scalars_of
from optaxclip.tuning.sweep import final_loss

Init = Callable[[Any, jax.Array], Any]
TrainStep = Callable[[Any, Any, Any], tuple[Any, jax.Array]]
Evaluate = Callable[[Any], jax.Array]
Report = Callable[[int, jax.Array], None]


class Program(NamedTuple):
    """The user's functions, vmapped over runs and compiled once, for the public function `call`."""

    call: str
    start: Callable
    step: Callable
    evaluate: Callable | None


class Runs(NamedTuple):
    """Results of n runs: `first` and `final` have shape (n,), the others (n, steps)."""

    first: np.ndarray
    final: np.ndarray
    losses: np.ndarray
    clipped: np.ndarray
    norms: np.ndarray


def check_arguments(call: str, name: str, function: Any, *arguments: str) -> None:
    """Raises unless the function can be called with these arguments."""
    form = f"{name} must be a function of ({', '.join(arguments)})"
    if not callable(function):
        raise validate.fail(form, function, call=call)
    # Checked before tracing: inside `vmap` the error would come from JAX, far from the call.
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some builtins have no signature.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{call}: {form}, got {name}{signature}: {error}.") from error


def first_argument(function: Callable) -> str:
    """Returns the name of a function's first argument, or "value" if it has none."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):
        return "value"
    return first.name if first is not None and first.kind is not first.VAR_POSITIONAL else "value"


def compile_program(step: TrainStep, init: Init, evaluate: Evaluate | None, call: str) -> Program:
    """Compiles the functions into one program.

    Raises:
      ValueError: for functions that take other arguments; when they are traced, for functions that
        return something else.
    """
    check_arguments(call, "step", step, "value", "state", "batch")
    check_arguments(call, "init", init, "value", "key")
    if evaluate is not None:
        check_arguments(call, "evaluate", evaluate, "state")

    def start(value, seed):
        return init(value, jax.random.key(seed))

    def step_once(value, state, batch):
        out = step(value, state, batch)
        if not (isinstance(out, tuple) and len(out) == 2 and _is_loss(out[1])):
            raise ValueError(
                f"{call}: step must return (new state, loss), in this order, the loss a real"
                f" scalar; it returned {_describe(out)}."
            )
        state, loss = out
        return state, {"loss": loss, **_read_clips(state)}

    # Donated, because otherwise every step would hold the state of all runs twice. Batches are
    # shared by all runs, not mapped.
    stepped = jax.jit(jax.vmap(step_once, (0, 0, None)), donate_argnums=1)
    checked = evaluate and jax.jit(jax.vmap(_check_evaluate(evaluate, call)))
    return Program(call, jax.jit(jax.vmap(start)), stepped, checked)


def _check_evaluate(evaluate: Evaluate, call: str) -> Evaluate:
    """Makes `evaluate` raise if its result is not a loss."""

    def evaluate_once(state):
        loss = evaluate(state)
        if not _is_loss(loss):
            raise ValueError(
                f"{call}: evaluate must return a loss, a real scalar; it returned"
                f" {_describe(loss)}."
            )
        return loss

    return evaluate_once


def _is_loss(x: Any) -> bool:
    return jax.tree_util.all_leaves([x]) and jnp.shape(x) == () and jnp.isrealobj(x)


def _describe(x: Any) -> str:
    if isinstance(x, tuple) and type(x) is tuple:
        return f"({', '.join(map(_describe, x))})"
    return f"an array of shape {x.shape}" if isinstance(x, jax.Array) else f"a {type(x).__name__}"


def _read_clips(state: Any) -> dict[str, jax.Array]:
    """Reads norm and clip rate of a step; of several clips, the first norm and the largest rate."""
    # Not `metrics`, which refuses anything but an Optax state: here the state is the user's own.
    clips = [scalars_of(part, "") for part in find_parts(state) if isinstance(part, Metrics)]
    rates, norms = (
        [seen[key] for seen in clips if key in seen] for key in ("clipped", "grad_norm")
    )
    return {"clipped": jnp.max(jnp.stack(rates)), "norm": norms[0]} if rates else {}


def run(
    program: Program,
    value: Any,
    seed: np.ndarray,
    batches: Iterable[Any],
    report: Report | None = None,
) -> Runs:
    """Trains all runs side by side. Only `report` waits for the device before the end."""
    # Transferred once: NumPy arrays would be sent to the device at every step.
    value = jax.tree.map(jnp.asarray, value)
    state = program.start(value, jnp.asarray(seed))
    first = program.evaluate(state) if program.evaluate else None
    steps = []
    for i, batch in enumerate(batches):
        state, seen = program.step(value, state, batch)
        steps.append(seen)
        if report:
            report(i, seen["loss"])
    if not steps:
        raise ValueError(f"{program.call}: there must be at least one batch.")
    # Fetched together at the end, so that no step waits for the device.
    steps = jax.device_get(steps)
    unknown = np.full(len(seed), np.nan)
    losses, clipped, norms = (
        np.stack([seen.get(key, unknown) for seen in steps], axis=1)
        for key in ("loss", "clipped", "norm")
    )
    if program.evaluate:
        return Runs(np.asarray(first), np.asarray(program.evaluate(state)), losses, clipped, norms)
    return Runs(losses[:, 0], final_loss(losses), losses, clipped, norms)


def run_in_parts(
    program: Program, value: np.ndarray, seed: np.ndarray, batches: Iterable[Any], size: int
) -> Runs:
    """Trains `size` runs at a time; the last part is padded with earlier runs."""
    # Each part reads all batches, and an iterator can be read only once.
    if size < len(value):
        batches = list(batches)
    # Parts of equal size share one program: a shorter last part would be compiled again.
    places = [np.arange(i, i + size) % len(value) for i in range(0, len(value), size)]
    parts = [run(program, value[at], seed[at], batches) for at in places]
    return Runs(*(np.concatenate(field)[: len(value)] for field in zip(*parts, strict=True)))


def find_limit(first: np.ndarray) -> float:
    """Finds the largest loss at the start: a run that ends above it has diverged."""
    # Finite losses only: nothing would exceed an infinite limit.
    known = first[np.isfinite(first)]
    return float(known.max()) if known.size else np.inf
