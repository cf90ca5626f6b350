"""What the benchmarks share: races between functions in one process, and tables in documents."""

import re
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

MARKS = "<!-- {0} -->", "<!-- end {0} -->"


def race(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Times each function in each round, in seconds. Every other round runs in reverse order."""
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


def compare_times(times: Mapping[str, np.ndarray], base: str) -> dict[str, str]:
    """Formats times relative to those of `base` in the same round: the median and quartiles."""
    return {name: format_quartiles(seconds / times[base]) for name, seconds in times.items()}


def format_quartiles(values) -> str:
    """Formats a median with its quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def describe_device() -> str:
    """Describes in words what this process runs on."""
    kind = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, {jax.device_count()} x {jax.default_backend()} ({kind})"


def publish(text: str, document: str | None, name: str) -> None:
    """Prints a text, and writes it into a document if one is given."""
    print(text)
    if document:
        put_into(document, name, text)


def put_into(document: str, name: str, text: str) -> None:
    """Writes a text into a document, between the marks of that name."""
    start, end = (mark.format(name) for mark in MARKS)
    with open(document) as file:
        old = file.read()
    if start not in old:
        raise ValueError(f"{document} has no mark {start}.")
    between = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    # A function, because backslashes in a replacement string would be escapes.
    new = between.sub(lambda _: f"{start}\n\n{text.strip()}\n\n{end}", old)
    with open(document, "w") as file:
        file.write(new)
