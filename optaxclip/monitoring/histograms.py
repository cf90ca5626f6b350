"""Counts the elements of each block by powers of ten."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import xla
from optaxclip.base import AxisNames, Exclude, Scope
from optaxclip.engine import lay_out
from optaxclip.trees import select

# float16 flushes values below the first edge to zero, and overflows above the last.
_POWERS = np.arange(-8, 6)
BINS = len(_POWERS) + 1


class Histograms(NamedTuple):
    """Histograms of |g| at one step.

    Attributes:
      edges: (bins + 1,), the edges of the bins: 0, 10⁻⁸, ..., 10⁵, infinity.
      counts: for each block (bins,), the number of elements in each bin; NaN is in none.
    """

    edges: np.ndarray
    counts: dict[str, np.ndarray]


def count_elements(
    updates: Any, scope: Scope, exclude: Exclude, axis_names: AxisNames | None
) -> jax.Array:
    """Counts the elements of each block by size in one read of the updates: int32 (B, bins)."""
    leaves = select(updates, exclude)
    span = xla.find_span(leaves.arrays, leaves.paths, axis_names)
    layout = lay_out(scope, leaves.paths, leaves.shapes, span)

    def count(arrays, *_):
        return arrays, xla.count_reaching(arrays, layout, (0.0, *10.0**_POWERS))

    _, reached = xla.call_in_auto_axes(count, leaves.arrays, np.int32(0))
    return (reached - jnp.pad(reached[1:], ((0, 1), (0, 0)))).T


def edges() -> np.ndarray:
    """Returns the edges of the bins."""
    return np.concatenate([[0.0], 10.0**_POWERS, [np.inf]])


def log_edges(edges: np.ndarray) -> np.ndarray:
    """Returns the edges over log10 |g|, since on a linear axis almost all bins have no width."""
    powers = np.log10(edges[1:-1])
    # The outer bins reach to 0 and to infinity, and are drawn as wide as the others.
    return np.concatenate([powers[:1] - 1, powers, powers[-1:] + 1])
