"""The laws. Of the record of a clip: norms, bounds and factors are those of the oracle. Of the
updates: they are the gradients times the factors, and what the wrapper makes of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.base import ClipState
from optaxclip.record import find_nodes
from tests.soak import oracle
from tests.soak.parts import SHAPES, Composition, draw
from tests.soak.run import run


class Seen(NamedTuple):
    """The record of a clip, one row a step: (steps, blocks)."""

    norms: np.ndarray
    bounds: np.ndarray
    factors: np.ndarray
    over: np.ndarray
    clipped: np.ndarray
    bad: np.ndarray
    total: np.ndarray


def hold(parts: Composition) -> None:
    """Raises AssertionError where a law is broken."""
    grads = draw(parts)
    with np.errstate(all="ignore"):
        updates, states = run(parts, grads)
        keeps_types(parts, grads, updates)
        LAWS.get(parts.wrapper, obeys)(parts, grads, updates, states)


def keeps_types(parts, grads, updates) -> None:
    """Shapes and dtypes; integers and None are as they were, or a step is skipped."""
    skips = parts.wrapper not in ("none", "watch", "masked")
    for before, after in zip(grads, updates, strict=True):
        assert before.keys() == after.keys()
        for path, g in before.items():
            if path not in SHAPES:
                skipped = skips and not np.any(after[path])
                np.testing.assert_array_equal(
                    after[path], 0 * g if skipped and g is not None else g
                )
            else:
                assert (after[path].dtype, after[path].shape) == (g.dtype, g.shape), path


def record_of(states) -> Seen:
    """Of the last clip in the states."""

    def flat(x):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])

    rows = [find_nodes(state, ClipState)[-1].metrics[:7] for state in states]
    return Seen(*map(np.stack, zip(*[map(flat, row) for row in rows], strict=True)))


def wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def is_same(a, b) -> None:
    # Widened: to NumPy a NaN in bfloat16 is not a NaN.
    np.testing.assert_array_equal(wide(a), wide(b))


def keeps_record(parts: Composition, grads, states) -> tuple[Seen, dict[str, np.ndarray]]:
    """Norms, bounds, factors and counts are those of the oracle; returns them, and the blocks."""
    ids, count = oracle.cut(parts.scope, parts.measured)
    seen = record_of(states)
    measures(parts, grads, ids, count, seen)
    finite, bounds = np.isfinite(seen.norms), oracle.bounds_of(parts.threshold, seen.norms)
    np.testing.assert_allclose(seen.bounds[finite], bounds[finite], rtol=1e-3, atol=1e-37)
    fine = decides(parts, seen)
    np.testing.assert_array_equal(seen.total[:, 0], np.arange(1, len(grads) + 1))
    np.testing.assert_array_equal(seen.bad, np.cumsum(~fine, axis=0))
    np.testing.assert_array_equal(seen.clipped, np.cumsum((seen.over > 0) & fine, axis=0))
    return seen, ids


def obeys(parts: Composition, grads, updates, states) -> None:
    """The laws of a clip that saw these gradients and made these updates."""
    if not grads:
        return
    seen, ids = keeps_record(parts, grads, states)
    for path in SHAPES:
        for step, g in enumerate(grads):
            if path in ids:
                multiplies(parts, g[path], updates[step][path], seen.factors[step][ids[path]])
            else:
                is_same(updates[step][path], g[path])


def measures(parts, grads, ids, count, seen: Seen) -> None:
    numbers = np.concatenate([block.ravel() for block in ids.values()])
    largest = float(np.finfo(seen.norms.dtype).max)
    # Beside the largest float rounding decides; units are measured up to 1e36.
    edge = 1e36 if "unit" in parts.scope else 0.999 * largest
    for g, norms in zip(grads, seen.norms, strict=True):
        moduli = np.abs(np.concatenate([wide(g[path]).ravel() for path in ids]))
        want = oracle.norms_of(parts.norm, moduli, numbers, count)
        sure = ~((want > edge) & (want < largest * 1.001))
        want = np.where(want > largest, np.inf, want)
        np.testing.assert_array_equal(np.isfinite(norms)[sure], np.isfinite(want)[sure])
        ok = np.isfinite(want) & sure
        np.testing.assert_allclose(norms[ok], want[ok], rtol=2e-5, atol=1e-36)


def decides(parts, seen: Seen) -> np.ndarray:
    """The factors are right. Returns which blocks count as finite."""
    n, b, info = wide(seen.norms), wide(seen.bounds), np.finfo(seen.norms.dtype)
    want = oracle.factors_of(parts.action, n, b)
    fits = np.abs(want) <= float(info.max)
    fine = np.isfinite(n) & fits & ~((b > 0) & (b < n * float(info.tiny)))
    np.testing.assert_allclose(seen.factors[fine], want[fine], rtol=2e-5, atol=1e-37)
    bad = seen.factors[~fine]
    assert (bad == 0).all() if parts.nonfinite == "zero" else np.isnan(bad).all()
    np.testing.assert_array_equal(seen.over, seen.norms > seen.bounds)
    return fine


def multiplies(parts, g, u, factors) -> None:
    """A factor of 1 changes no bit; others are rounded once; a bad block is all NaN, or zeros."""
    is_same(u[factors == 1], g[factors == 1])
    # 0 makes zeros of anything.
    near(u, np.where(factors == 0, 0, wide(g) * wide(factors)))
    if parts.action == "rescale":
        fine = np.isfinite(factors)
        assert not (np.abs(wide(u[fine])) > np.abs(wide(g[fine]))).any()


def near(got: np.ndarray, want: np.ndarray, terms: Any = None) -> None:
    """The same but for the rounding of terms of this size."""
    info = jnp.finfo(got.dtype)
    want = want.astype(got.dtype)
    terms = np.abs(wide(want)) if terms is None else terms
    least = 2 * max(float(info.smallest_subnormal), 1e-37)
    # Beside infinity the last bit of a factor decides.
    edge = np.isinf(wide(want)) & (np.abs(wide(got)) > 0.99 * float(info.max))
    got, want, terms = wide(got)[~edge], wide(want)[~edge], terms[~edge]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    off = (got != want) & ~(
        np.isnan(got) | (np.abs(got - want) <= max(float(info.eps), 4e-7) * terms + least)
    )
    assert not off.any(), (got[off], want[off])


def after_momentum(parts, grads, updates, states) -> None:
    """What comes out is m = v + 0.9 m, of what the clip makes, v."""
    if not grads:
        return
    (seen, ids), m = keeps_record(parts, grads, states), dict.fromkeys(SHAPES, np.zeros(()))
    for step, g in enumerate(grads):
        for path in SHAPES:
            f = seen.factors[step][ids[path]] if path in ids else np.ones(())
            v = wide(np.where(f == 0, 0, wide(g[path]) * f).astype(g[path].dtype))
            want = v + 0.9 * m[path]
            # A sum may be beyond the largest number where its terms are not.
            small = ~(np.abs(want) > float(jnp.finfo(g[path].dtype).max) / 2)
            terms = 4 * (np.abs(v) + np.abs(0.9 * m[path]))
            near(updates[step][path][small], want[small], terms[small])
            m[path] = wide(updates[step][path])


def lengths_of(grads) -> np.ndarray:
    """Of all leaves: infinite or NaN where any number is, or there is no such float."""
    out = [np.sqrt(sum((np.abs(wide(g[p])) ** 2).sum() for p in SHAPES)) for g in grads]
    return np.array([n if n < float(jnp.finfo("float32").max) else np.inf for n in out])


def taken(grads, updates, states, skip) -> list[list]:
    """The steps that were taken; at the others the updates are zero, and no state moves."""
    last, rows = None, []
    for row, bad in zip(zip(grads, updates, states, strict=True), skip, strict=True):
        _, update, state = row
        if not bad:
            rows.append(row)
        else:
            assert not any(np.any(update[path]) for path in SHAPES)
        if bad and last is not None:
            jax.tree.map(is_same, state.inner, last)
        last = state.inner
    return list(map(list, zip(*rows, strict=True))) if rows else [[], [], []]


def after_skip_nonfinite(parts, grads, updates, states) -> None:
    after_momentum(parts, *taken(grads, updates, states, ~np.isfinite(lengths_of(grads))))


def after_skip_spikes(parts, grads, updates, states) -> None:
    skip, row = [], 0
    for n in lengths_of(grads):
        bad = not np.isfinite(n) or (n > 1e3 and row < 2)
        row = row + 1 if bad else 0
        skip.append(bad)
    obeys(parts, *taken(grads, updates, states, skip))


def after_loss_scale(parts, grads, updates, states) -> None:
    """Gradients are over S, which falls at a bad step, and grows after two good ones."""
    scale, row, seen, skip = 4.0, 0, [], []
    for g in grads:
        # A power of two: nothing is rounded, but for the smallest numbers.
        now = {path: g[path] / g[path].dtype.type(scale) for path in SHAPES}
        seen.append(now)
        bad = not np.isfinite(lengths_of([now])[0])
        skip.append(bad)
        row = 0 if bad else row + 1
        scale = max(scale / 2, 1.0) if bad else scale * 2 if row == 2 else scale
        row = 0 if row == 2 else row
    np.testing.assert_array_equal(states[-1].loss_scale, scale)
    inner = [state.inner for state in states]
    obeys(parts, *taken(seen, updates, inner, skip))


def after_multi_steps(parts, grads, updates, states) -> None:
    """Every second step is that of the mean of two."""
    for i, u in enumerate(updates):
        # In Optax it is zero times what the clip made, which is NaN if that is.
        if (lengths_of(grads[: i + 1]) < 1e36).all() and i % 2 == 0:
            assert not any(np.any(x) for x in u.values())
    np.testing.assert_array_equal(record_of(states).total[:, 0], np.arange(1, len(states) + 1) // 2)


def after_apply_if_finite(parts, grads, updates, states) -> None:
    """Nothing is applied of what is not finite, unless three in a row were not."""
    row = 0
    for g, u, state in zip(grads, updates, states, strict=True):
        row = 0 if all(np.isfinite(wide(x)).all() for x in g.values()) else row + 1
        assert state.notfinite_count == row
        if 0 < row <= 2:
            assert not any(np.any(x) for x in u.values())


LAWS: dict[str, Any] = {
    "momentum": after_momentum,
    "skip_nonfinite": after_skip_nonfinite,
    "skip_spikes": after_skip_spikes,
    "dynamic_loss_scale": after_loss_scale,
    "MultiSteps": after_multi_steps,
    "apply_if_finite": after_apply_if_finite,
}
