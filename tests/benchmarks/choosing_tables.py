"""The tables of docs/choosing.md, from the results of `choosing`.

A score is a mean over seeds. It is compared with that of the tuned global norm, paired by seed: the
two runs have the same initial parameters and the same batches.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks.reporting import table

REFERENCE = "clip_by_global_norm"
DRAWS = 10_000
HEAD = ["method", "default", "against", "lost", "tuned to", "tuned", "against"]
TOTALS = ["method", "default: better", "alike", "worse", "tuned: better", "alike", "worse", "lost"]
KINDS = {"clean": "clean batches", "bad": "one batch in a hundred bad"}
UNNAMED = "no clip", "running, capped"  # not functions of the library


def cap(losses, failed: float) -> np.ndarray:
    """Caps losses: a run that is lost, also to NaN, counts as one that has learned nothing."""
    losses = np.asarray(losses)
    return np.where(losses <= failed, losses, failed)


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean, rounded to the two digits that are shown."""
    count = len(differences)
    drawn = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    low, high = np.quantile(differences[drawn].mean(-1), [0.025, 0.975]).round(2)
    return float(low), float(high)


def name_verdict(scores: np.ndarray, reference: np.ndarray) -> str:
    """Says whether scores are better than the reference. Lower is better."""
    low, high = bootstrap(scores - reference)
    return "better" if high < 0 else "worse" if low > 0 else "alike"


def compare(scores: np.ndarray, reference: np.ndarray) -> str:
    """Formats the mean difference with its interval, with a mark if that contains zero."""
    difference = scores - reference
    mark = "≈ " if name_verdict(scores, reference) == "alike" else ""
    # Plus zero, so that no number is shown as -0.00.
    mean, low, high = np.array([difference.mean().round(2), *bootstrap(difference)]) + 0.0
    return f"{mark}{mean:+.2f} ({low:+.2f} to {high:+.2f})"


class Judged(NamedTuple):
    """The capped scores of one method on one task, with clean batches or with bad ones.

    Attributes:
      default, tuned: (seeds,), each at the rate that was picked for it.
      all: (runs,), all runs of the default: with clean batches, those at each of the three rates.
    """

    default: np.ndarray
    tuned: np.ndarray
    all: np.ndarray


def judge(line: dict[str, Any], failed: float) -> dict[str, Judged]:
    """Reads the scores of a method, for each kind of batches."""
    *rates, tuned, default_bad, tuned_bad = cap(line["judged"], failed)
    return {
        "clean": Judged(rates[line["usual"]], tuned, np.ravel(rates)),
        "bad": Judged(default_bad, tuned_bad, default_bad),
    }


def format_name(name: str) -> str:
    return name if name in UNNAMED else f"`{name}`"


def format_row(
    line: dict[str, Any], number: str, own: Judged, norm: Judged, failed: float
) -> list[str]:
    """Formats the row of a method in the table of a task."""
    lost = f"{np.sum(own.all == failed)} of {own.all.size}"
    setting = f"{number} {line['setting']:g}, " if number else ""
    return [
        format_name(line["method"]),
        f"{own.default.mean():.2f}",
        compare(own.default, norm.tuned),
        lost,
        f"{setting}rate {line['rate']:g}",
        f"{own.tuned.mean():.2f}",
        "" if line["method"] == REFERENCE else compare(own.tuned, norm.tuned),
    ]


def format_total(name: str, judged: list[tuple[Judged, Judged, float]]) -> list[str]:
    """Formats a row of the summary: how often a method is better than the norm, alike or worse."""
    cells = [format_name(name)]
    for which in ("default", "tuned"):
        found = [name_verdict(getattr(own, which), norm.tuned) for own, norm, _ in judged]
        cells += [str(found.count(word)) for word in ("better", "alike", "worse")]
    lost = sum(np.sum(own.all == failed) for own, _, failed in judged)
    return [*cells, f"{lost} of {sum(own.all.size for own, *_ in judged)}"]


def report(tasks, numbers: dict[str, str], lines: list[dict[str, Any]]) -> tuple[str, str]:
    """Formats the summary and two tables per task. `numbers` names what is tuned of each method."""
    judged = {}
    for line in lines:
        judged[line["task"], line["method"]] = judge(line, tasks[line["task"]].failed)
    text, totals = [], {line["method"]: [] for line in lines}
    for (name, task), (kind, title) in itertools.product(tasks.items(), KINDS.items()):
        rows, norm = [], judged[name, REFERENCE][kind]
        for line in (line for line in lines if line["task"] == name):
            own = judged[name, line["method"]][kind]
            rows.append(format_row(line, numbers[line["method"]], own, norm, task.failed))
            totals[line["method"]].append((own, norm, task.failed))
        text.append(f"### {task.name.split(', bad')[0]}, {title}\n\n{table(HEAD, rows)}")
    return table(TOTALS, [format_total(*item) for item in totals.items()]), "\n".join(text)
