"""How large the elements of each block are: counts by powers of ten."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import xla
from optaxclip.base import AxisNames, Exclude, Scope
from optaxclip.engine import lay_out
from optaxclip.trees import select

# Below the first lies what float16 flushes to zero, and its overflow above the last.
_POWERS = np.arange(-8, 6)
BINS = len(_POWERS) + 1


class Histograms(NamedTuple):
    """Histograms of |g| at one step.

    Attributes:
      edges: (bins + 1,), of the bins: 0, 10⁻⁸, ..., 10⁵, infinity.
      counts: for each block (bins,), how many elements there are in each bin; NaN is in none.
    """

    edges: np.ndarray
    counts: dict[str, np.ndarray]


def count_elements(
    updates: Any, scope: Scope, exclude: Exclude, axis_names: AxisNames | None
) -> jax.Array:
    """int32 (B, bins), the elements of each block by size, in one read of the updates."""
    leaves = select(updates, exclude)
    span = xla.find_span(leaves.arrays, leaves.paths, axis_names)
    layout = lay_out(scope, leaves.paths, leaves.shapes, span)

    def count(arrays, _):
        return arrays, xla.count_reaching(arrays, layout, (0.0, *10.0**_POWERS))

    _, reached = xla.call_in_auto_axes(count, leaves.arrays, None)
    return (reached - jnp.pad(reached[1:], ((0, 1), (0, 0)))).T


def edges() -> np.ndarray:
    """The limits of the bins."""
    return np.concatenate([[0.0], 10.0**_POWERS, [np.inf]])


def log_edges(edges: np.ndarray) -> np.ndarray:
    """The limits of the bins over log10 |g|: on a linear axis all bins but one had no width."""
    powers = np.log10(edges[1:-1])
    # The outer bins reach to 0 and to infinity; here they are as wide as the others.
    return np.concatenate([powers[:1] - 1, powers, powers[-1:] + 1])
