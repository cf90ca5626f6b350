"""Writes metrics to one line, a progress bar, CSV, TensorBoard, or Weights & Biases.

Each `to_...` returns a function of the step and the scalars of `optaxclip.metrics`, on the device
or not; `to_print` is such a function itself. Call it in a training loop, or pass it to
`optaxclip.report`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import numpy as np

from optaxclip.monitoring.display import format_number, format_share
from optaxclip.monitoring.histograms import Histograms, edges, log_edges
from optaxclip.monitoring.reading import check_is_state, count_blocks

Log = Callable[[int, Mapping[str, Any]], None]


def to_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the scalars of a step as Python numbers, and histograms as arrays, in one transfer.

    >>> import jax.numpy as jnp
    >>> from optaxclip import loggers
    >>> loggers.to_numbers({"clip/bound": jnp.float32(0.5), "clip/steps": jnp.int32(3)})
    {'clip/bound': 0.5, 'clip/steps': 3}
    """
    # One call for all of them: each scalar fetched by itself would wait for the device.
    read = jax.device_get(dict(row))
    return {key: x if np.ndim(x) else np.asarray(x).item() for key, x in read.items()}


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a row without its histograms."""
    return {key: x for key, x in to_numbers(row).items() if not np.ndim(x)}


def histograms(opt_state: Any) -> Histograms:
    """Reads how many elements of each block lay between powers of ten at the last step.

    Args:
      opt_state: the state of an optimizer that contains `optaxclip.watch(histogram=True)`.

    Returns:
      `Histograms`, which `optaxclip.plots.plot_histogram` draws, without counts if no watch made
      any. `edges` is (bins + 1,), and `counts` has (bins,) for each block.

    Raises:
      ValueError: for anything that cannot be a state.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.watch(histogram=True)
    >>> grads = {"w": jnp.array([0.0, 3e-4, 0.5, 2.0, 7.0])}
    >>> counts = optaxclip.loggers.histograms(tx.update(grads, tx.init(grads))[1]).counts
    >>> print(counts["w"])
    [1 0 0 0 0 1 0 0 1 2 0 0 0 0 0]
    """
    check_is_state(opt_state, "histograms")
    return Histograms(edges(), jax.device_get(count_blocks(opt_state)))


def postfix(row: Mapping[str, Any]) -> dict[str, str]:
    """Formats a row for a progress bar: `bar.set_postfix(loggers.postfix(metrics(state)))`.

    Args:
      row: the scalars of `optaxclip.metrics`, with any prefix, and optionally `loss`.

    Returns:
      The loss, the norm, the bound and the share of steps clipped, as far as they are known, and
      how many steps were skipped or not finite, if there were any.

    >>> from optaxclip import loggers
    >>> loggers.postfix({"clip/grad_norm": 8.0, "clip/bound": 1.0, "clip/clipped_fraction": 0.25})
    {'norm': '8.0', 'bound': '1.0', 'clipped': '25 %'}
    """
    row = to_numbers(row)

    def find(key, beside=""):
        """Finds a key in the first clip, watch or wrapper that has it, and the key `beside`."""
        heads = [k.removesuffix(key) for k in row if k == key or k.endswith(f"/{key}")]
        return next((row[head + key] for head in heads if head + (beside or key) in row), None)

    # A watch comes first: it saw the gradient, which a second clip in the chain does not see.
    norm = find("grad_norm", beside="median_ratio")
    norm = find("grad_norm") if norm is None else norm
    shown = {
        "loss": (row.get("loss"), format_number),
        "norm": (norm, format_number),
        "bound": (find("bound"), format_number),
        "clipped": (find("clipped_fraction"), format_share),
        # A count of 0 is not worth showing.
        "skipped": (find("steps", beside="consecutive") or None, str),
        "nonfinite": (find("nonfinite_steps") or None, str),
    }
    return {name: write(x) for name, (x, write) in shown.items() if x is not None}


def format_line(step: int, row: Mapping[str, Any]) -> str:
    """Formats one step in one line.

    >>> from optaxclip import loggers
    >>> loggers.format_line(7, {"watch/grad_norm": 2.0, "watch/nonfinite_steps": 1, "loss": 0.5})
    'step 7: loss 0.5, norm 2.0, nonfinite 1'
    """
    # `report` under `vmap` prints the lines of several runs in turn.
    run = f", run {row['run']}" if "run" in row else ""
    return f"step {step}{run}: " + ", ".join(f"{name} {x}" for name, x in postfix(row).items())


def to_print(step: int, row: Mapping[str, Any]) -> None:
    """Prints one step in one line."""
    print(format_line(step, row), flush=True)


def to_csv(file: TextIO) -> Log:
    """Writes a table with one row per step: `loggers.to_csv(open("run.csv", "w", newline=""))`.

    The columns are those of the first row.

    >>> import sys
    >>> from optaxclip import loggers
    >>> log = loggers.to_csv(sys.stdout)
    >>> log(1, {"clip/bound": 0.5})
    step,clip/bound
    1,0.5
    """
    writer: csv.DictWriter | None = None

    def log(step, row):
        nonlocal writer
        row = {"step": step} | _scalars(row)
        # The columns are not known before the first row.
        if writer is None:
            # Keys that appear later are ignored, because the header is already written.
            writer = csv.DictWriter(file, list(row), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        file.flush()  # so that a killed run still leaves its last rows

    return log


def to_tensorboard(writer: Any) -> Log:
    """Writes scalars and histograms with the `SummaryWriter` of tensorboardX or PyTorch."""

    def log(step, row):
        for key, x in to_numbers(row).items():
            if np.ndim(x):
                _add_histogram(writer, key, x, step)
            else:
                writer.add_scalar(key, x, step)

    return log


def _add_histogram(writer: Any, key: str, counts: Any, step: int) -> None:
    # Not `add_histogram`, which counts values itself: the values never leave the device.
    limits = log_edges(edges())
    middles = np.convolve(limits, [0.5, 0.5], "valid")
    writer.add_histogram_raw(
        key,
        min=limits[0],
        max=limits[-1],
        num=int(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=limits[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def to_wandb(run: Any) -> Log:
    """Logs to a run of Weights & Biases: `loggers.to_wandb(wandb.init(...))`."""

    def log(step, row):
        numbers = to_numbers(row)
        run.log({key: _as_bars(x) if np.ndim(x) else x for key, x in numbers.items()}, step=step)

    return log


def _as_bars(counts: Any) -> Any:
    import wandb  # installed by the user, who has passed a run

    return wandb.Histogram(np_histogram=(np.asarray(counts), log_edges(edges())))


def to_clu(writer: Any) -> Log:
    """Writes with a `clu.metric_writers` writer, or any with `write_scalars(step, scalars)`."""
    return lambda step, row: writer.write_scalars(step, _scalars(row))


__all__ = [
    "Histograms",
    "format_line",
    "histograms",
    "postfix",
    "to_clu",
    "to_csv",
    "to_numbers",
    "to_print",
    "to_tensorboard",
    "to_wandb",
]
