"""Reports from inside the compiled step, for loops that never return the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optaxclip import validate
from optaxclip.compat import manual_axes
from optaxclip.engine import Description, guarded
from optaxclip.monitoring.history import History
from optaxclip.monitoring.loggers import to_print
from optaxclip.monitoring.reading import count_blocks, find_parts, metrics
from optaxclip.wrappers.steps import find_loss

Callback = Callable[[int, dict[str, Any]], Any]


class ReportState(NamedTuple):
    """State of `report`.

    Attributes:
      total_steps: int32, all steps.
      inner: the state of the optimizer.
    """

    total_steps: jax.Array
    inner: optax.OptState


@validate.named
def report(
    inner: optax.GradientTransformation,
    callback: Callback | History | None = None,
    *,
    every: int = 100,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer, and reports its `metrics` from inside the compiled step.

    Use it in training loops that do not return the optimizer's state, such as
    `flowjax.train.fit_to_data` or `gpjax.fit`. It works under `jit`, `scan`, `vmap`, `pmap` and
    `shard_map`. Between reports nothing is computed or transferred.

    Args:
      inner: the optimizer, with clips, watches or skip wrappers in it.
      callback: called on the host as `callback(step, row)`, where the row has what `metrics`
        returns as Python numbers, `loss` if `update` is passed `loss=` or `value=`, and
        `histogram/<block>` if a watch has histograms. Or a `History`. None or `print` prints one
        line. `optaxclip.loggers` has more.
      every: it reports at the first step, and at all multiples of this number.

    Returns:
      A transformation with a `ReportState`. The updates are those of `inner`.

    Raises:
      ValueError: if `inner` is not an optimizer, or `every` is below 1; at `init`, if there is
        nothing to report.

    Reports are asynchronous: `jax.effects_barrier()` waits for the last. Under `vmap` there is one
    for each run, and `row["run"]` is its number, counted from 0. On several devices the first one
    reports. Put it around `optax.MultiSteps`, which runs its inside at every small step.

    >>> import jax, jax.numpy as jnp, optaxclip
    >>> history = optaxclip.History()
    >>> tx = optaxclip.report(optaxclip.clip_by_global_norm(1.0), history, every=2)
    >>> @jax.jit
    ... def train(grads):
    ...     def step(state, g):
    ...         return tx.update(g, state)[::-1]
    ...     return jax.lax.scan(step, tx.init(grads[0]), grads)[1]
    >>> updates = train(jnp.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]))
    >>> jax.effects_barrier()
    >>> history.arrays()["step"], history.arrays()["clip/grad_norm"]
    (array([1., 2.]), array([5., 2.]))
    """
    inner = validate.as_optimizer(inner)
    validate.size(every=every)
    deliver = _as_callback(callback)
    call = validate.called()

    def init_fn(params):
        state = inner.init(params)
        # Optimizers are functions, so only a state shows what is inside.
        if not find_parts(state):
            raise ValueError(
                f"{call}: no clip, watch or skip wrapper of optaxclip in this optimizer: write"
                f" {call}(optax.chain(optaxclip.watch(), optimizer))."
            )
        return ReportState(jnp.zeros((), jnp.int32), state)

    def update_fn(updates, state, params, **extra_args):
        updates, new = inner.update(updates, state.inner, params, **extra_args)
        step = jnp.asarray(optax.safe_increment(state.total_steps))
        due = (step == 1) | (step % jnp.int32(every) == 0)
        _send(deliver, due & _is_first_device(), step, new, find_loss(extra_args))
        return updates, ReportState(step, new)

    return guarded(ReportState, init_fn, update_fn, Description(kind="other", inner=inner))


def _as_callback(callback: Any) -> Callback:
    # `print` itself would get the whole dict.
    if callback is None or callback is print:
        return to_print
    if isinstance(callback, History):
        return lambda step, row: callback.append(
            {key: x for key, x in row.items() if not np.ndim(x)}, step=step
        )
    if not callable(callback):
        raise validate.fail("callback must be a function of (step, row), or a History", callback)
    return callback


def _send(deliver: Callback, due, step, state, loss) -> None:
    """Calls back if a report is due. The metrics are computed in that branch, so only then."""

    def send():
        row = metrics(state) | ({} if loss is None else {"loss": jnp.asarray(loss)})
        row |= {f"histogram/{block}": x for block, x in count_blocks(state).items()}
        alike: dict[Any, list[str]] = {}
        for key, x in row.items():
            alike.setdefault((x.dtype, x.shape), []).append(key)
        # One array per dtype and shape, because every operand is a separate transfer.
        packed = [jnp.stack([row[key] for key in keys]) for keys in alike.values()]
        run = _number_runs(jnp.int32(-1), packed)

        def receive(due, step, run, *packed):
            # In a batch of runs some may not be due.
            if not due:
                return
            pairs = zip(alike.values(), packed, strict=True)
            read = {k: x for keys, xs in pairs for k, x in zip(keys, np.asarray(xs), strict=True)}
            seen = {k: read[k] if np.ndim(read[k]) else read[k].item() for k in row}
            deliver(int(step), seen if run < 0 else seen | {"run": int(run)})

        jax.debug.callback(receive, due, step, run, *packed)

    # Not `ordered=True`, which works neither under `vmap` nor on several devices.
    # Not filtered on the host alone: every step would pay for the metrics and the transfer.
    lax.cond(_any(due), send, lambda: None)


@jax.custom_batching.custom_vmap
def _any(due):
    """Whether any of a batch of runs is due.

    Under `vmap` a `cond` whose condition differs between runs becomes a select, which runs both
    branches and would call back at every step. Here all runs share one condition.
    """
    return due


@_any.def_vmap
def _any_of_batch(size, batched, due):
    return _any(jnp.any(due, axis=0)), False


@jax.custom_batching.custom_vmap
def _number_runs(run, packed):
    """Returns the number of a run in the batch, or -1 if `packed` shows that there is no batch."""
    return run


@_number_runs.def_vmap
def _number_runs_of_batch(size, batched, run, packed):
    inside = run if batched[0] else jnp.broadcast_to(run, (size, *run.shape))
    ours = jnp.arange(size, dtype=np.int32).reshape(size, *(1,) * (inside.ndim - 1))
    # The innermost `vmap` comes first, so the number so far counts the runs inside one of ours.
    return _number_runs(jnp.maximum(inside, 0) + ours * (inside.size // size), packed), True


def _is_first_device():
    """Whether this is the first of the devices that run the step in parallel.

    Under plain `jit` only one of them calls back; in `shard_map` and `pmap` each would.
    """
    first = [lax.axis_index(axis) == 0 for axis in manual_axes()]
    return jnp.all(jnp.stack([jnp.bool_(True), *first]))
