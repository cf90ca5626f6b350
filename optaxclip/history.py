"""A recorded run: what `metrics` said at each step, as arrays with one entry a step."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

History = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def stacked(history: History, clip: int = 0) -> dict[str, np.ndarray]:
    """The history of one clip, on the host: keys without their prefix, each an array with one entry a step.

    Args:
      history: a list with a dict for each step, as `optaxclip.metrics` returns it, with your own entries ("loss"), if
        you like; or a dict of arrays. Steps that lack a key have NaN there.
      clip: which, if there are several clips in the state.

    Returns:
      A dict: "grad_norm", "bound", "clipped", ..., "grad_norm/<block>", ..., "loss".

    Raises:
      ValueError: for a history without a step, or with several runs in it.

    >>> from optaxclip.history import stacked
    >>> stacked([{"clip/grad_norm": 1.0, "loss": 3.0}, {"clip/grad_norm": 2.0, "loss": 1.0}])
    {'grad_norm': array([1., 2.]), 'loss': array([3., 1.])}
    """
    if not isinstance(history, Mapping):
        names = dict.fromkeys(key for seen in history for key in seen)
        history = {key: [np.asarray(seen.get(key, np.nan), float) for seen in history] for key in names}
    arrays = {key: np.asarray(value, float) for key, value in history.items()}
    if not arrays or any(x.ndim != 1 or not x.size for x in arrays.values()):
        shapes = {key: x.shape for key, x in arrays.items()}
        raise ValueError(f"A history has one number a step under each key, and at least one step; got {shapes}.")
    return _of_clip(arrays, clip)


def _of_clip(arrays: dict[str, np.ndarray], clip: int) -> dict[str, np.ndarray]:
    """Without the prefix `clip/` or `clip/<number>/`, and without the other clips."""
    found = {}
    for key, value in arrays.items():
        match = re.fullmatch(r"(?:clip/)?(?:(\d+)/)?(.*)", key)
        number, name = match.groups() if match else (None, key)
        if number is None or int(number) == clip:
            found[name] = value
    return found


def blocks(seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms by block, if the clip was by block."""
    return {key.removeprefix("grad_norm/"): x for key, x in seen.items() if key.startswith("grad_norm/")}
