"""What a clip has to do, retold in NumPy: one block number for each number of the gradients."""

import functools
import math

import jax
import numpy as np

from tests.soak.parts import COUNTING, SHAPES, THRESHOLDS

# Which axes of a leaf lie within one block.
WITHIN = {
    "units by convention": lambda path, rank: (0,),
    "units of rows": lambda path, rank: (rank - 1,),
    "element": lambda path, rank: (),
    "stacked": lambda path, rank: range(path.startswith("layers"), rank),
    "stacked groups": lambda path, rank: range(path.startswith("layers"), rank),
}
# Which leaves share blocks.
LABELS = {
    "tree": lambda path: "",
    "groups": lambda path: path.rpartition("/")[0],
    "groups by letter": lambda path: "ab"[path < "d"],
    "stacked groups": lambda path: path.rpartition("/")[0],
}


def cut(scope: str, paths: list[str]) -> tuple[dict[str, np.ndarray], int]:
    """The block of each number of each leaf, in the order of the record; how many there are."""
    spans = {}
    for path in paths:
        rank = len(SHAPES[path])
        whole = scope not in WITHIN or (rank < 2 and scope not in ("element", "stacked"))
        spans[path] = tuple(range(rank)) if whole else tuple(WITHIN[scope](path, rank))
    if "units" in scope or scope == "element":
        # Leaves that are one unit have norms in one array, with the first of them.
        wholes = [path for path in paths if len(spans[path]) == len(SHAPES[path])]
        key = {path: paths.index(wholes[0] if path in wholes else path) for path in paths}
        paths = sorted(paths, key=key.__getitem__)
    starts, out, count = {}, {}, 0
    for path in paths:
        shape, axes = SHAPES[path], spans[path]
        kept = [n for axis, n in enumerate(shape) if axis not in axes]
        label = LABELS.get(scope, lambda path: path)(path)
        if label not in starts:
            starts[label] = count
            count += math.prod(kept)
        own = starts[label] + np.arange(math.prod(kept)).reshape(kept)
        out[path] = np.broadcast_to(np.expand_dims(own, axes), shape)
    return out, count


def norms_of(norm: str, moduli: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """The norm of each block."""
    if norm == "linf":
        out = np.zeros(count)
        np.maximum.at(out, ids, moduli)
        return out
    p = {"l1": 1, "l1.5": 1.5, "l3": 3}.get(norm, 2)
    total = np.bincount(ids, moduli**p, count)
    if norm == "rms":
        total = total / np.maximum(np.bincount(ids, minlength=count), 1)
    return total ** (1 / p)


def factors_of(action: str, n: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What each block is multiplied by: the length that it shall have, over that which it has."""
    target = {
        "rescale": lambda: np.minimum(n, b),
        "normalize": lambda: np.where(np.isinf(b), n, b),
        "zero": lambda: np.where(n > b, 0, n),
        "smooth": lambda: n * (1 + (n / b) ** 2) ** -0.5,
        "smooth, p=1": lambda: n / (1 + n / b),
        "band": lambda: np.clip(n, np.where(np.isinf(b), 0, 0.5 * b), b),
        "band with a floor": lambda: np.clip(n, np.minimum(0.25, b), b),
    }[action]()
    return np.where(n == 0, 1, target / np.where(n == 0, 1, n))


@functools.cache
def _alone(threshold: str):
    """The threshold of one block, over a series of norms."""
    rule = THRESHOLDS[threshold]

    def bounds(norms):
        def step(state, norm):
            bound, state = rule.update(norm, state)
            return state, bound

        return jax.lax.scan(step, rule.init(norms[0]), norms)[1]

    return jax.jit(jax.vmap(bounds))


ROOM = 64


def bounds_of(threshold: str, norms: np.ndarray) -> np.ndarray:
    """The bound of each block at each step, from its own finite norms alone: (steps, blocks)."""
    if threshold == "until, then":
        after = np.cumsum(np.isfinite(norms).any(1)) - np.isfinite(norms).any(1)
        return np.where(after[:, None] < 2, 1, bounds_of("running", norms))
    fine = np.isfinite(norms)
    some = fine.any(1, keepdims=True)
    moves = np.broadcast_to(some if threshold in COUNTING else fine, fine.shape)
    place = np.cumsum(moves, axis=0) - moves
    series = np.ones((ROOM, len(norms)), norms.dtype)
    for step, block in np.argwhere(moves):
        series[block, place[step, block]] = norms[step, block] if fine[step, block] else 1
    bounds = np.asarray(_alone(threshold)(series))
    place = np.minimum(place, len(norms) - 1)
    return np.maximum(np.take_along_axis(bounds[: norms.shape[1]].T, place, axis=0), 0)
