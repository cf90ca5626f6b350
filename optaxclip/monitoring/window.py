"""A recorded run, sorted by what it says: the window that `diagnose` judges."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip.history import Recorded, columns


class Window(NamedTuple):
    """A recorded window, sorted by what it says.

    Attributes:
      norms: (steps,), the total norm.
      blocks: for each block (steps,), its norm.
      clips: for each clip its `clipped`, `grad_norm` and `bound`, each (steps,).
      losses, param_norms: (steps,); None where they are unknown.
    """

    norms: np.ndarray
    blocks: dict[str, np.ndarray]
    clips: dict[str, dict[str, np.ndarray]]
    losses: np.ndarray | None
    param_norms: np.ndarray | None


def as_window(history: Recorded, losses: Any = None, param_norms: Any = None) -> Window:
    """A window out of a `History`, of dicts of scalars, one a step, or of a dict of arrays.

    Raises:
      ValueError: if no norm is found in it.
    """
    table = columns(history)
    roots = sorted((key for key in table if re.search(r"(^|/)grad_norm$", key)), key=lambda key: "watch" not in key)
    if not roots:
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(table)[:20]}: record optaxclip.metrics(opt_state), of"
            " a chain with optaxclip.watch() or a clip in it."
        )
    of_blocks = [{key[len(root) + 1 :]: table[key] for key in table if key.startswith(root + "/")} for root in roots]
    heads = [key[: -len("bound")] for key in table if re.search(r"(^|/)bound$", key)]
    clips = {head: {field: table[head + field] for field in ("clipped", "grad_norm", "bound")} for head in heads}
    return Window(
        table[roots[0]],
        next(filter(None, of_blocks), {}),
        clips,
        _series(losses, table, "loss"),
        _series(param_norms, table, "param_norm"),
    )


def _series(given: Any, table: Mapping[str, np.ndarray], key: str) -> np.ndarray | None:
    return table.get(key) if given is None else np.asarray(jax.device_get(given), np.float64)
