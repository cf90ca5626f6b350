"""A sweep over thresholds as one compiled program: all values and seeds side by side, by `vmap` of your own train step.

A value is a tracer in there, so anything that a clip takes as a number can be swept, and nothing is compiled twice.
The steps are a Python loop: a `lax.scan` over steps would take all batches at once, and is slow on a CPU where the
step holds a convolution.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.record import metrics
from optaxclip.tuning.sweep import Sweep, capped, settled

Init = Callable[[Any, jax.Array], Any]
TrainStep = Callable[[Any, Any, Any], tuple[Any, jax.Array]]
Evaluate = Callable[[Any], jax.Array]
Watch = Callable[[int, jax.Array], None]


class Program(NamedTuple):
    """The user's functions, vmapped over runs and compiled once."""

    start: Callable
    step: Callable
    evaluate: Callable | None


class Runs(NamedTuple):
    """What n runs side by side did: `first` and `final` have shape (n,), the others (n, steps)."""

    first: np.ndarray
    final: np.ndarray
    losses: np.ndarray
    clipped: np.ndarray
    norms: np.ndarray


def tune(
    step: TrainStep,
    init: Init,
    values: Sequence[float],
    *,
    batches: Iterable[Any],
    seeds: int | Sequence[int] = 3,
    evaluate: Evaluate | None = None,
    baseline: float | None = np.inf,
    failed: float | None = None,
    at_once: int | None = None,
) -> Sweep:
    """Trains with every value of any number in a clip, on every seed, side by side in one compiled program.

    Build the optimizer from the value inside both functions, with `make_tx(value)`: it is a tracer there.

    Args:
      step: (value, state, batch) -> (new state, loss). One train step of yours, without `jit`; the state is any pytree
        that holds the state of the optimizer, from which the clip rate is read.
      init: (value, key) -> state.
      values: what to try, in any order.
      batches: one a step, the same for all runs, so that values are compared on equal terms. For other data for each
        seed, keep a key in the state, and pass `range(steps)`.
      seeds: how many keys, or which: the key of a run is `jax.random.key(seed)`.
      evaluate: state -> loss, the lower the better, taken before the first step and after the last. None: the median of
        the training loss over the last tenth of the steps.
      baseline: the value that stands for no clip, run as well. inf is right for all clips but percentiles and
        quantiles (100 and 1 there); None: no baseline.
      failed: a run that ends above this, or not finite, has diverged. None: the largest loss at the start.
      at_once: how many runs side by side, if memory does not hold all; the others follow, without a new compile.

    Returns:
      A `Sweep`: `print` it for the table and the recommendation, `.plot()` it, take `.recommended.value`.

    Raises:
      ValueError: for no values or seeds, a value that is NaN, or no batches.

    >>> import jax, jax.numpy as jnp, optax, optaxclip
    >>> def make_tx(value):
    ...     return optax.chain(optaxclip.clip_by_global_norm(value), optax.sgd(0.1))
    >>> def init(value, key):
    ...     params = jax.random.normal(key, (3,))
    ...     return params, make_tx(value).init(params)
    >>> def step(value, state, batch):
    ...     params, opt_state = state
    ...     loss, grads = jax.value_and_grad(lambda p: jnp.sum(jnp.cosh(batch * p)))(params)
    ...     updates, opt_state = make_tx(value).update(grads, opt_state, params)
    ...     return (optax.apply_updates(params, updates), opt_state), loss
    >>> sweep = optaxclip.tune(step, init, [0.01, 10.0], batches=[1.0, 2.0] * 20)
    >>> sweep.recommended.value
    10.0
    """
    grid = _grid(values, baseline)
    keys = np.asarray(range(seeds) if isinstance(seeds, int) else seeds, np.int32)
    if not keys.size:
        raise ValueError("tune: there must be at least one seed.")
    value, seed = (part.ravel() for part in np.meshgrid(grid, keys, indexing="ij"))
    runs = _in_parts(_program(step, init, evaluate), value, seed, batches, at_once or len(value))
    limit = _limit(runs.first) if failed is None else failed
    final, losses, clipped, norms = (part.reshape(len(grid), len(keys), *part.shape[1:]) for part in runs[1:])
    return Sweep(grid, keys, final, losses, clipped, norms, limit, baseline)


def objective(
    step: TrainStep,
    init: Init,
    suggest: Callable[[Any], Any],
    *,
    batches: Iterable[Any],
    seeds: int | Sequence[int] = 3,
    evaluate: Evaluate | None = None,
    failed: float | None = None,
) -> Callable[[Any], float]:
    """What `tune` measures, as an objective for Optuna: the mean final loss over seeds, one compile for all trials.

    A diverged run counts as `failed`. The median training loss over seeds is reported at every tenth of a run, so that
    Optuna can prune.

    Args:
      suggest: trial -> value: a number, or any pytree of numbers, which `step` and `init` get: a threshold and a
        learning rate, say.
      step, init, batches, seeds, evaluate, failed: as in `tune`.

    Returns:
      A function of a trial, for `study.optimize`. The lower the better.

    Raises:
      ImportError: without Optuna, the extra `tune`.

    >>> import jax, jax.numpy as jnp, optax, optaxclip  # doctest: +SKIP
    >>> def suggest(trial):  # doctest: +SKIP
    ...     return trial.suggest_float("max_norm", 0.01, 100.0, log=True)
    >>> study = optuna.create_study()  # doctest: +SKIP
    >>> study.optimize(optaxclip.tuning.objective(step, init, suggest, batches=batches), 20)  # doctest: +SKIP
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("objective needs Optuna: pip install 'optaxclip[tune]'.") from error

    program, data = _program(step, init, evaluate), list(batches)
    keys = np.asarray(range(seeds) if isinstance(seeds, int) else seeds, np.int32)
    period = max(len(data) // 10, 1)

    def watch(trial, i, losses):
        if (i + 1) % period:
            return
        trial.report(float(np.nan_to_num(np.median(np.asarray(losses)), nan=np.inf)), i)
        if trial.should_prune():
            raise optuna.TrialPruned()

    def of_trial(trial) -> float:
        value = jax.tree.map(lambda number: jnp.full(keys.shape, number, float), suggest(trial))
        runs = _run(program, value, keys, data, lambda i, losses: watch(trial, i, losses))
        return float(np.mean(capped(runs.final, _limit(runs.first) if failed is None else failed)))

    return of_trial


def _grid(values: Sequence[float], baseline: float | None) -> np.ndarray:
    """The values and the baseline, sorted, each once."""
    grid = np.unique([float(value) for value in values])
    if not grid.size or np.isnan(grid).any():
        raise ValueError(f"tune: values must be numbers, at least one, got {values!r}.")
    return grid if baseline is None else np.union1d(grid, [float(baseline)])


def _program(step: TrainStep, init: Init, evaluate: Evaluate | None) -> Program:
    def start(value, seed):
        return init(value, jax.random.key(seed))

    def one(value, state, batch):
        state, loss = step(value, state, batch)
        return state, {"loss": loss, **_of_clips(state)}

    stepped = jax.jit(jax.vmap(one, (0, 0, None)), donate_argnums=1)
    return Program(jax.jit(jax.vmap(start)), stepped, None if evaluate is None else jax.jit(jax.vmap(evaluate)))


def _of_clips(state: Any) -> dict[str, jax.Array]:
    """Norm and clip rate of a step; with several clips, the norm before the first, and the largest rate."""
    found = metrics(state, prefix="")
    rates = [x for key, x in found.items() if re.fullmatch(r"(\d+/)?clipped", key)]
    norms = [x for key, x in found.items() if re.fullmatch(r"(0/)?grad_norm", key)]
    return {"clipped": jnp.max(jnp.stack(rates)), "norm": norms[0]} if rates else {}


def _run(program: Program, value: Any, seed: np.ndarray, batches: Iterable[Any], watch: Watch | None = None) -> Runs:
    """Runs side by side, from start to end. Nothing waits for the device before the last step, but for `watch`."""
    value = jax.tree.map(jnp.asarray, value)
    state = program.start(value, jnp.asarray(seed))
    first = program.evaluate(state) if program.evaluate else None
    steps = []
    for i, batch in enumerate(batches):
        state, seen = program.step(value, state, batch)
        steps.append(seen)
        if watch:
            watch(i, seen["loss"])
    if not steps:
        raise ValueError("tune: there must be at least one batch.")
    steps = jax.device_get(steps)
    unknown = np.full(len(seed), np.nan)
    losses, clipped, norms = (
        np.stack([seen.get(key, unknown) for seen in steps], axis=1) for key in ("loss", "clipped", "norm")
    )
    if program.evaluate:
        return Runs(np.asarray(first), np.asarray(program.evaluate(state)), losses, clipped, norms)
    return Runs(losses[:, 0], settled(losses), losses, clipped, norms)


def _in_parts(program: Program, value: np.ndarray, seed: np.ndarray, batches: Iterable[Any], size: int) -> Runs:
    """All runs, `size` at a time. The last part is filled up with runs done before, so that one compile does."""
    if size < len(value):
        batches = list(batches)
    places = [np.arange(i, i + size) % len(value) for i in range(0, len(value), size)]
    parts = [_run(program, value[at], seed[at], batches) for at in places]
    return Runs(*(np.concatenate(field)[: len(value)] for field in zip(*parts, strict=True)))


def _limit(first: np.ndarray) -> float:
    """The largest loss at the start: what ends above it has diverged."""
    known = first[np.isfinite(first)]
    return float(known.max()) if known.size else np.inf
