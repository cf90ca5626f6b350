"""Sweeps over thresholds: `tune` on a grid of values, `objective` for Optuna."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import validate
from optaxclip.tuning.runs import (
    Evaluate,
    Init,
    TrainStep,
    check_arguments,
    compile_program,
    find_limit,
    first_argument,
    run,
    run_in_parts,
)
from optaxclip.tuning.sweep import Sweep, cap_diverged


@validate.named
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
    """Trains with every value and seed side by side, in one compiled program.

    A value may be any number in a clip. Build the optimizer from it inside both functions, as with
    `make_tx(value)` below, since it is a tracer there.

    Args:
      step: (value, state, batch) -> (new state, loss). Your train step, without `jit`; the state is
        any pytree that contains the optimizer's state, from which the clip rate is read. The table
        and the plot have the name of its first argument, such as `max_norm`.
      init: (value, key) -> state.
      values: what to try, in any order.
      batches: one per step, the same for all runs, so that values are compared on equal terms. To
        use different data for each seed, keep a key in the state and pass `range(steps)`.
      seeds: how many seeds, or a list of them: the key of a run is `jax.random.key(seed)`.
      evaluate: state -> loss, lower is better; called before the first step and after the last.
        None: the median of the training loss over the last tenth of the steps.
      baseline: the value that stands for no clip, which is run as well. inf is right for all clips
        except percentiles and quantiles (there 100 and 1). None: no baseline.
      failed: a run that ends above this, or not finite, has diverged. None: the largest loss at the
        start.
      at_once: how many runs to train side by side, if not all of them fit in memory; the others
        follow without a new compile.

    Returns:
      A `Sweep`: `print` it for the table and the recommendation, draw it with
      `optaxclip.plots.plot_sweep`, or take `.recommended.value`.

    Raises:
      ValueError: without values, seeds or batches; for a value that is NaN, or functions that take
        or return something else.

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
    program = compile_program(step, init, evaluate, "tune")
    if at_once is not None:
        validate.size(at_once=at_once)
    grid, keys = _read_values(values, baseline), _read_seeds(seeds, "tune")
    # Values by seeds, flattened, so that `vmap` has a single axis.
    value, seed = (part.ravel() for part in np.meshgrid(grid, keys, indexing="ij"))
    runs = run_in_parts(program, value, seed, batches, at_once or len(value))
    # One limit for all runs: with a limit of its own, a bad start would excuse a bad end.
    limit = find_limit(runs.first) if failed is None else failed
    final, losses, clipped, norms = (
        part.reshape(len(grid), len(keys), *part.shape[1:]) for part in runs[1:]
    )
    name = first_argument(step)
    return Sweep(grid, keys, final, losses, clipped, norms, limit, baseline, name)


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
    """Makes an objective for Optuna, the mean final loss over seeds; compiled once for all trials.

    A diverged run counts as `failed`. The median training loss over seeds is reported at every
    tenth of a run, so that Optuna can prune.

    Args:
      suggest: trial -> value: a number, or any pytree of numbers, such as a threshold and a
        learning rate. `step` and `init` receive it.
      step, init, batches, seeds, evaluate, failed: as in `tune`.

    Returns:
      A function of a trial, for `study.optimize`. Lower is better.

    Raises:
      ImportError: if Optuna, the extra `tune`, is not installed.
      ValueError: for functions that take something else, or no seeds; at the first trial, for
        functions that return something else, or no batches.

    >>> import jax, jax.numpy as jnp, optax, optaxclip  # doctest: +SKIP
    >>> def suggest(trial):  # doctest: +SKIP
    ...     return trial.suggest_float("max_norm", 0.01, 100.0, log=True)
    >>> study = optuna.create_study()  # doctest: +SKIP
    >>> loss = optaxclip.tuning.objective(step, init, suggest, batches=batches)  # doctest: +SKIP
    >>> study.optimize(loss, n_trials=20)  # doctest: +SKIP
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "objective needs Optuna, which is an extra: pip install 'optaxclip[tune]'."
        ) from error

    check_arguments("objective", "suggest", suggest, "trial")
    # Outside the trial, so that it is compiled once per study.
    program = compile_program(step, init, evaluate, "objective")
    # A list, because every trial reads the batches again.
    data, keys = list(batches), _read_seeds(seeds, "objective")
    # Each report waits for the device, and ten per run are enough for a pruner.
    period = max(len(data) // 10, 1)

    def report(trial, i, losses):
        if (i + 1) % period:
            return
        trial.report(float(np.nan_to_num(np.median(np.asarray(losses)), nan=np.inf)), i)
        if trial.should_prune():
            raise optuna.TrialPruned()

    def run_trial(trial) -> float:
        # One copy per seed, since `vmap` maps the value along with the seed.
        value = jax.tree.map(lambda number: jnp.full(keys.shape, number, float), suggest(trial))
        runs = run(program, value, keys, data, lambda i, losses: report(trial, i, losses))
        return float(
            np.mean(cap_diverged(runs.final, find_limit(runs.first) if failed is None else failed))
        )

    return run_trial


def _read_values(values: Sequence[float], baseline: float | None) -> np.ndarray:
    """Returns the values and the baseline, sorted and without duplicates."""
    try:
        grid = np.unique([float(value) for value in values])
    except (TypeError, ValueError):
        grid = np.zeros(0)
    if not grid.size or np.isnan(grid).any():
        raise validate.fail("values must be a list of numbers, at least one", values)
    # A union, so that a baseline among the values is run only once.
    return grid if baseline is None else np.union1d(grid, [float(baseline)])


def _read_seeds(seeds: int | Sequence[int], call: str) -> np.ndarray:
    # Plain numbers, because keys are made inside `vmap`, and no array of keys is needed.
    keys = np.asarray(range(seeds) if isinstance(seeds, int) else seeds, np.int32)
    if not keys.size or keys.ndim != 1:
        raise validate.fail(
            "seeds must be a number of seeds, or a list of them, at least one", seeds, call=call
        )
    return keys
