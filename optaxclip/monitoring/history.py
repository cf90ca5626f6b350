"""Collects the scalars of each step on the host, without waiting for the device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import validate
from optaxclip.monitoring.display import describe_columns
from optaxclip.monitoring.fits import MISSING
from optaxclip.states import kind_of

# Steps fetched together: few enough for the device to hold, enough to spread the cost.
_BATCH = 256
# The placement of a Python number.
_HOST: tuple = ((),)


class History:
    """Collects the dict of scalars of each step on the host, without waiting for the device.

    The scalars of a step are copied into one array on the device, so that their buffers may be
    donated to the next step, and are fetched together with those of other steps. Memory is bounded:
    a full history keeps every other step, then every fourth and so on, plus the steps at which
    something stands out from its neighbours. Steps with a key that others lack, such as a loss that
    is logged now and then, are counted by themselves.

    Args:
      window: how many of the last steps to keep; None: the whole run, thinned out.
      every: records one step in this many; the others cost nothing.
      max_steps: how many steps of the whole run to keep; at least 64.

    Attributes:
      steps: (rows,), the number of each recorded step, counted from 1 in the order of `append`.

    Raises:
      ValueError: if `window`, `every` or `max_steps` is not a whole number, or is too small.

    >>> import optaxclip
    >>> history = optaxclip.History()
    >>> for loss in (3.0, 2.0):
    ...     history.append({"clip/grad_norm": 1.0}, loss=loss)
    >>> history.arrays()
    {'clip/grad_norm': array([1., 1.]), 'loss': array([3., 2.])}
    """

    def __init__(self, window: int | None = None, *, every: int = 1, max_steps: int = 20_000):
        with validate.speak_for("History"):
            validate.size(every=every, max_steps=max_steps, window=1 if window is None else window)
            validate.at_least(64, max_steps=max_steps)
        self._window, self._every, self._max_steps = window, every, max_steps
        self._appended, self._stride = 0, 1
        # How many rows there were with each set of keys.
        self._alike: Counter[frozenset[str]] = Counter()
        self._waiting: list[tuple[int, int, dict[Any, Any]]] = []
        # The column of each key, and tables of rows. Column 0 of a table is the step, and column 1
        # the number of the row among those with the same keys.
        self._columns: dict[str, int] = {}
        self._tables: list[np.ndarray] = []

    def append(self, metrics: Mapping[str, Any], **more: Any) -> None:
        """Records one step: `optaxclip.metrics(opt_state)`, and for example `loss=`.

        Raises:
          ValueError: for anything but a dict of scalars, such as a state; inside a compiled step.
        """
        if not isinstance(metrics, Mapping):
            raise ValueError(
                "History.append takes the scalars of one step, not a state: write"
                f" history.append(optaxclip.metrics(opt_state), loss=loss). Got {kind_of(metrics)}."
            )
        self._appended += 1
        if (self._appended - 1) % self._every:
            return
        row = {**metrics, **more}
        packed, keys = _pack(row), frozenset(row)
        self._alike[keys] += 1
        for x in packed.values():
            # The copy runs while the device continues, so that nothing waits for it later.
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        self._waiting.append((self._appended, self._alike[keys], packed))
        if len(self._waiting) >= _BATCH:
            self._fetch()

    def _fetch(self) -> None:
        """Brings the waiting steps from the device to the host, as one more table."""
        waiting, self._waiting = self._waiting, []
        read = jax.device_get([packed for *_, packed in waiting])
        # Rows with the same keys in the same groups are filled together.
        alike = defaultdict(list)
        for i, packed in enumerate(read):
            alike[tuple(packed)].append(i)
        for name in (name for groups in alike for group in groups for name in group[0]):
            self._columns.setdefault(name, len(self._columns) + 2)
        table = np.full((len(waiting), len(self._columns) + 2), MISSING)
        table[:, :2] = [numbers for *numbers, _ in waiting]
        for groups, rows in alike.items():
            for group in groups:
                columns = [self._columns[name] for name in group[0]]
                table[np.ix_(rows, columns)] = [read[i][group] for i in rows]
        self._tables.append(table)
        if sum(map(len, self._tables)) > 2 * (self._window or self._max_steps // 2):
            self._tables = [self._join()]

    def _join(self) -> np.ndarray:
        """Joins the tables into one, and thins it out if it is full."""
        width = len(self._columns) + 2
        padded = [
            np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=MISSING)
            for x in self._tables
        ]
        table = np.concatenate(padded) if padded else np.empty((0, width))
        if self._window:
            return table[-self._window :]
        full, table = len(table) > self._max_steps, _thin(table, self._stride)
        # To well below the limit: thinning at every batch would have a quadratic cost. The first
        # row of each set of keys always stays, so there may be more than that.
        while full and len(table) > self._max_steps * 3 // 4 and self._stride < self._appended:
            self._stride *= 2
            table = _thin(table, self._stride)
        return table

    def _read(self) -> np.ndarray:
        if self._waiting:
            self._fetch()
        return self._join()

    @property
    def steps(self) -> np.ndarray:
        return self._read()[:, 0].astype(np.int64)

    def __getitem__(self, key: Any) -> NoReturn:
        # Does not return the column: each call would fetch everything that waits on the device.
        raise TypeError(f"a History has no items: write history.arrays()[{key!r}].")

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return describe_columns(self.steps, self.arrays())

    def _repr_markdown_(self) -> str:
        return describe_columns(self.steps, self.arrays(), markdown=True)

    def rows(self) -> list[dict[str, float]]:
        """Returns one dict per step, with NaN where a step lacks a key."""
        return [dict(zip(self._columns, row, strict=True)) for row in self._read()[:, 2:].tolist()]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns one array per key with one entry per step, NaN where a step lacks the key."""
        table = self._read()
        return {key: table[:, column].copy() for key, column in self._columns.items()}


def _pack(row: Mapping[str, Any]) -> dict[Any, Any]:
    """Packs a row into few arrays: values on a device by dtype and placement, the rest in one.

    Returns:
      For each group, its keys and their common placement -> the array of their values.
    """
    # A fast path for rows of floats, as in a long list of recorded steps: it skips `_placement`.
    if set(map(type, row.values())) == {float}:
        return {(tuple(row), _HOST): np.array(list(row.values()))}
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, x in row.items():
        groups[_placement(x)].append(key)
    # Shapes are known without waiting for the numbers, so the mistaken call itself can raise.
    wide = {key: kind[0] for kind, keys in groups.items() if kind[0] for key in keys}
    if wide:
        raise ValueError(
            "A history takes one number under each key, not these shapes or types:"
            f" {dict(list(wide.items())[:3])}. For several runs (vmap), append each to a History of"
            " its own. The stacked dict that lax.scan returns is a history already."
        )
    packed: dict[Any, Any] = {}
    for kind, keys in groups.items():
        values = [MISSING if row[key] is None else row[key] for key in keys]
        packed[tuple(keys), kind] = np.array(values, float) if kind == _HOST else _stack(values)
    return packed


def _placement(x: Any) -> tuple:
    """Returns the shape of a value, and its dtype and sharding if it is on a device."""
    if isinstance(x, str):  # not a number; the error comes with those of shapes
        return ("str",)
    if type(x) is float or not isinstance(x, jax.Array):
        return _HOST if type(x) is float else (np.shape(x),)
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            "A history is for the host, between steps: return the metrics from the compiled step"
            " and append them on the host. The stacked dict that lax.scan returns is a history"
            " already."
        )
    # A jitted function takes arrays of one placement only, and strict promotion needs one dtype.
    return x.shape, x.dtype, x.sharding


@jax.jit
def _stack(scalars: list[jax.Array]) -> jax.Array:
    return jnp.stack(scalars)


def _thin(table: np.ndarray, stride: int) -> np.ndarray:
    """Keeps one step in `stride`, and a quarter more: those that stand out."""
    regular = (table[:, 1] - 1) % stride == 0
    if regular.all():
        return table
    most = int(regular.sum()) // 4 + 1
    score = np.where(regular, 0, _stand_out(table[:, 2:], most))
    extra = np.argsort(score)[-most:]
    return table[np.union1d(np.flatnonzero(regular), extra[score[extra] > 0])]


def _stand_out(x: np.ndarray, room: int) -> np.ndarray:
    """Scores how far each row is from its neighbours, in the column where it is farthest."""
    finite = np.isfinite(x)
    edges = finite[1:] != finite[:-1]
    # A key that comes and goes at more rows than there is room for is in some rows only.
    steady = edges.sum(axis=0) <= room
    x, finite, edges = x[:, steady], finite[:, steady], edges[:, steady]
    # The first and last step of each stretch of NaN: those in between are all the same.
    ends = np.zeros(len(x), bool)
    ends[1:] |= (edges & ~finite[1:]).any(axis=1)
    ends[:-1] |= (edges & ~finite[:-1]).any(axis=1)
    x = np.where(finite, x, 0.0)
    middle = x.copy()
    # The median of three follows counters and trends, so that only single steps differ from it.
    low, high = np.minimum(x[:-2], x[2:]), np.maximum(x[:-2], x[2:])
    middle[1:-1] = np.clip(x[1:-1], low, high)
    distance = np.abs(x - middle)
    typical = distance.mean(axis=0)
    with np.errstate(over="ignore"):
        score = (distance / np.where(typical > 0, typical, 1)).max(axis=1, initial=0)
    return np.where(ends, np.inf, score)
