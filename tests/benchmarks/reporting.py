"""What the benchmarks share: races between functions in one process, and tables in a document."""

import re
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

MARKS = "<!-- {0} -->", "<!-- end {0} -->"


def race(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each function in each round: side by side, in an order that is reversed every
    other round.
    """
    names = list(runs)
    times = {name: np.zeros(rounds) for name in names}
    for name in names:
        jax.block_until_ready(runs[name]())
    for i in range(rounds):
        for name in names if i % 2 else names[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            times[name][i] = time.perf_counter() - start
    return times


def ratios(times: Mapping[str, np.ndarray], base: str) -> dict[str, str]:
    """The time of each relative to `base` in the same round: the median, and the quartiles."""
    return {name: quartiles(seconds / times[base]) for name, seconds in times.items()}


def quartiles(values) -> str:
    """A median with its quartiles, as text."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def device() -> str:
    """What this was measured on, in words."""
    kind = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, {jax.device_count()} x {jax.default_backend()} ({kind})"


def publish(text: str, document: str | None, name: str) -> None:
    """Prints a text, and puts it into the document, if there is one."""
    print(text)
    if document:
        put_into(document, name, text)


def put_into(document: str, name: str, text: str) -> None:
    """Writes a text between the marks of that name in a document."""
    start, end = (mark.format(name) for mark in MARKS)
    with open(document) as file:
        old = file.read()
    if start not in old:
        raise ValueError(f"{document} has no mark {start}.")
    new = f"{start}\n\n{text.strip()}\n\n{end}"
    with open(document, "w") as file:
        file.write(
            re.sub(
                f"{re.escape(start)}.*?{re.escape(end)}", lambda match: new, old, flags=re.DOTALL
            )
        )
