"""What each program may cost beside Optax's: the limits, in one table, and what became of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tests.benchmarks.accelerators_cases import Case
from tests.benchmarks.accelerators_steps import CLIPS, CPU, MAPPED, NONE, OURS

Rows = Mapping[str, Mapping[str, float]]
PEER, AS_ON_CPU = "the row of Optax", "the ratio on the CPU"

ALL = tuple(name for name, clip in CLIPS.items() if clip.beside)
LEAF = ("clip_by_leaf_norm",)
WHOLE = ("clip_by_global_norm",)
LEARNED = ("zclip", "autoclip", "quantile_clip", "clip_by_median", "skip_spikes")
GROUPED = ("adagc", "clip_by_group_norm")
BY_NORM = (*WHOLE, *LEAF, *LEARNED, *GROUPED)
LAYERS = ("clip_by_leaf_norm, stacked", "clip_by_group_norm, stacked")
UNITS = ("adaptive_grad_clip",)
VALUES = ("clip",)


class Limit(NamedTuple):
    """`column` is at most `times` that of `beside`, plus `plus`."""

    suites: str
    models: str  # "" for all
    rows: tuple[str, ...]
    column: str
    plus: float = 0
    times: float = 1
    beside: str = ""  # a row, PEER, AS_ON_CPU, or nothing: `plus` alone


LIMITS = (
    # A GPU's host waits for the condition of a loop and the index of a branch.
    Limit("gpu tpu mesh pod", "", ALL, "loops"),
    Limit("gpu tpu mesh pod", "", ALL, "branches"),
    Limit("scan", "", ALL, "loops", beside=PEER),
    Limit("scan", "", ALL, "branches", beside=PEER),
    # One H100.
    Limit("gpu", "gpt2", WHOLE, "kernels", 60),
    Limit("gpu", "resnet50", WHOLE, "kernels", 130),
    Limit("gpu", "gpt2-xl", WHOLE, "kernels", 120),
    Limit("gpu", "gpt2 gpt2-2", LEARNED, "kernels", 20, 1, WHOLE[0]),
    Limit("gpu", "gpt2", LEAF, "kernels", 60),
    Limit("gpu", "gpt2", GROUPED, "kernels", 100),
    Limit("gpu", "gpt2", UNITS, "kernels", 100),
    Limit("gpu", "gpt2-xl", LEAF, "kernels", 120),
    Limit("gpu", "gpt2-xl", UNITS, "kernels", 600),
    Limit("gpu", "gpt2-stacked", LAYERS, "kernels", 0, 1, LEAF[0]),
    Limit("gpu", "", VALUES, "kernels", 10, 1, NONE),
    # In float32: 32.1 for norms, 40.2 for units, 28.1 for values.
    Limit("gpu", "", (*BY_NORM, *LAYERS), "bytes", 0.1, 1, PEER),
    Limit("gpu", "", UNITS, "bytes", 4.2, 1, PEER),
    Limit("gpu", "", VALUES, "bytes", 0.1, 1, NONE),
    Limit("gpu", "gpt2-xl", (*WHOLE, *LEAF, *UNITS), "temporaries", 0.01),
    Limit("gpu", "gpt2 gpt2-xl resnet50", (*WHOLE, *UNITS), "compile", 0, 1.7, PEER),
    Limit("gpu", "gpt2-xl", LEAF, "compile", 0, 1.7, PEER),
    # The sums of a watch are those of the clip behind it.
    Limit("gpu", "gpt2 gpt2-2 resnet50", ("watch", "watch, by leaf"), "kernels", 7, 1, WHOLE[0]),
    Limit("gpu", "gpt2 gpt2-2", ("watch, histogram",), "kernels", 25, 1, WHOLE[0]),
    # What CI compiles. Fewer leaves are alike in two layers, and 1 s is soon half as much again.
    Limit("gpu", "gpt2-2", WHOLE, "kernels", 0, 0.7, PEER),
    Limit("gpu", "gpt2-2", (*LEAF, *UNITS), "kernels", 0, 1, PEER),
    Limit("gpu", "gpt2-2", (*WHOLE, *LEAF, *UNITS), "compile", 0, 3, PEER),
    # One TPU.
    Limit("tpu", "", (*WHOLE, "zclip"), "cycles", 0, 1.01, PEER),
    Limit("tpu", "", LEAF, "cycles", 0, 1.04, PEER),
    Limit("tpu", "", UNITS, "cycles", 0, 1.02, PEER),
    Limit("tpu", "", VALUES, "cycles", 0, 1.01, NONE),
    Limit("tpu", "", WHOLE, "kernels", beside=PEER),
    Limit("tpu", "", (*WHOLE, *LEAF, "zclip", *UNITS), "compile", 0, 1.5, PEER),
    # Meshes.
    Limit("mesh pod", "", ALL, "all-gathers"),
    Limit("mesh pod", "", ALL, "others", beside=PEER),
    Limit("mesh pod", "", ALL, "all-reduces", beside=PEER),
    Limit("mesh pod", "", ALL, "moved"),
    Limit("mesh pod", "", (*WHOLE, *LEAF, "zclip", *UNITS), "bytes", 0, 1.05, PEER),
    Limit("mesh pod", "", (*WHOLE, *LEAF, "zclip", *UNITS), "cycles", 0, 1.05, PEER),
    Limit("mesh pod", "", (*WHOLE, *LEAF, "zclip", *UNITS), "compile", 0, 1.5, PEER),
    # Per example: beside vmap(grad), no worse than on the CPU.
    Limit("examples", "", (OURS,), "bytes", 0, 1, AS_ON_CPU),
    Limit("examples", "", (OURS,), "temporaries", 0, 1, AS_ON_CPU),
)


class Verdict(NamedTuple):
    """What became of a limit on one row of a case."""

    row: str
    column: str
    value: float
    most: float

    @property
    def kept(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.most


def judge(case: Case, rows: Rows, limits: Iterable[Limit] = LIMITS) -> list[Verdict]:
    """Every limit that has something to say of the rows of a case, the first that ours compile."""
    verdicts = [
        Verdict(name, "error", int("error" in row), 0)
        for name, row in rows.items()
        if find_peer(name)
    ]
    for limit in limits:
        if case.suite not in limit.suites.split():
            continue
        if limit.models and case.model not in limit.models.split():
            continue
        for name in rows:
            most = _bound(limit, rows, name) if name in limit.rows else None
            if most is not None and "error" not in rows[name]:
                verdicts.append(Verdict(name, limit.column, rows[name][limit.column], most))
    return verdicts


def _bound(limit: Limit, rows: Rows, name: str) -> float | None:
    """The most that a row may have; None where that which it is compared with is not there."""
    if not limit.beside:
        return limit.plus
    if limit.beside == AS_ON_CPU:
        on_cpu = [rows.get(row + CPU, {}).get(limit.column) for row in (OURS, MAPPED)]
        beside = rows.get(MAPPED, {}).get(limit.column)
        return None if None in (*on_cpu, beside) else limit.times * beside * on_cpu[0] / on_cpu[1]
    row = CLIPS[name].beside if limit.beside == PEER else limit.beside
    value = rows.get(row, {}).get(limit.column)
    return None if value is None else limit.times * value + limit.plus


def find_peer(name: str) -> str | None:
    """The row that ratios of a row are taken to."""
    if name in CLIPS:
        return CLIPS[name].beside or None
    return {OURS: MAPPED, OURS + CPU: MAPPED + CPU}.get(name)


def keep_best(
    rows: dict[str, dict], measure: Callable[[str], dict], case: Case, tries: int = 2
) -> None:
    """Compiles again what took too long, and what it is compared with: noise only adds time."""
    for _ in range(tries):
        late = {v.row for v in judge(case, rows) if v.column == "compile" and not v.kept}
        for name in late | {peer for peer in map(find_peer, late) if peer}:
            rows[name]["compile"] = min(rows[name]["compile"], measure(name)["compile"])
