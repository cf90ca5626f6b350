"""Properties that hold for any tree: magnitudes from 1e-38 to 3e38, ranks 0 to 6, empty leaves,
None, masked leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optaxclip

SHAPES = [(), (3,), (2, 3), (1, 2, 2), (2, 1, 2, 2), (1, 2, 1, 2, 1), (1, 1, 2, 1, 2, 1), (0, 4)]
DTYPES = ["float32", "bfloat16", "float16", "complex64"]
SCOPES = {
    "tree": optaxclip.scopes.tree,
    "leaf": optaxclip.scopes.leaf,
    "groups": optaxclip.scopes.groups(lambda path: str(int(path.split("/")[-1]) % 2)),
    "units": optaxclip.scopes.units(...),
}


@st.composite
def trees(draw):
    """A list of leaves of fixed shapes and dtypes (so that little is compiled), each of a magnitude
    of its own.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves = []
    for i, shape in enumerate(SHAPES):
        dtype = DTYPES[i % len(DTYPES)]
        low, high = (-7, 4) if dtype == "float16" else (-37.5, 38.0)
        scale = 10.0 ** draw(st.floats(low, high)) * draw(st.sampled_from([1, 1, 1, 0]))
        x = rng.uniform(-3, 3, size=shape) * scale
        leaves.append(
            jnp.asarray(
                np.clip(x, -3e38, 3e38) if dtype != "float16" else np.clip(x, -6e4, 6e4), dtype
            )
        )
    return [*leaves, None, optax.MaskedNode()]


def exact(x):
    return np.abs(np.asarray(x).astype(np.complex128)).ravel()


def blocks_of(scope, grads):
    leaves = [exact(g) for g in jax.tree.leaves(grads)]
    if scope == "tree":
        return [np.concatenate(leaves)]
    if scope == "groups":
        return [np.concatenate(leaves[i::2]) for i in range(2)]
    return leaves


def compiled(scope):
    @jax.jit
    def step(bound, grads):
        tx = optaxclip.clip_by(bound, scope=SCOPES[scope])
        updates, state = tx.update(grads, tx.init(grads))
        return updates, state.metrics.grad_norm

    return step


STEPS = {scope: compiled(scope) for scope in SCOPES}


FLOAT = np.finfo(np.float32)


def counts_as_bad(norm, bound, margin=1.0):
    """Whether a norm is no finite float, or the factor that shortens it no normal one."""
    return norm * margin > float(FLOAT.max) or bound < norm * margin * float(FLOAT.tiny)


@pytest.mark.parametrize("scope", SCOPES)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(grads=trees(), exponent=st.floats(-30, 38))
def test_every_block_is_within_its_bound_and_keeps_its_direction(scope, grads, exponent):
    bound = np.float32(10.0**exponent)
    updates, _ = STEPS[scope](bound, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    for before, after in zip(blocks_of(scope, grads), blocks_of(scope, updates), strict=True):
        norm = np.linalg.norm(before)
        if counts_as_bad(norm, float(bound), 1 - 1e-5):
            assert np.all(np.isnan(after))
            continue
        # Rounding may tip it into NaN, and norms of units are accurate only up to 1e36.
        may_be = counts_as_bad(norm, float(bound), 1 + 1e-5) or (scope == "units" and norm > 1e36)
        if may_be and np.all(np.isnan(after)):
            continue
        assert np.all(np.isfinite(after))
        factor = min(1.0, bound / norm) if norm else 1.0
        # A float16 or bfloat16 number is rounded once; numbers below the smallest normal float32
        # may be flushed to zero.
        smallest = 1e-7 if max(after, default=0) < 7e4 else 0.0
        np.testing.assert_allclose(
            after, before * factor, rtol=0.01, atol=max(smallest, 1.3e-38, 1e-6 * bound)
        )
        assert np.linalg.norm(after) <= float(bound) * 1.01 + 1e-6


@settings(deadline=None, max_examples=60, derandomize=True)
@given(grads=trees())
def test_the_norm_of_a_tree_is_right_at_any_magnitude(grads):
    _, norm = STEPS["tree"](np.float32(1.0), grads)
    [numbers] = blocks_of("tree", grads)
    want = np.linalg.norm(numbers)
    np.testing.assert_allclose(norm, want if want <= FLOAT.max else np.inf, rtol=1e-5, atol=1e-37)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(grads=trees(), bad=st.sampled_from([np.nan, np.inf, -np.inf]), where=st.integers(0, 2))
def test_one_bad_number_spoils_its_block_and_no_other(grads, bad, where):
    grads[1] = grads[1].at[where].set(bad)
    bound = np.float32(1e3)  # large enough that any float can be shortened to it
    updates, _ = STEPS["leaf"](bound, grads)
    norms = [np.linalg.norm(x) for x in blocks_of("leaf", grads)]
    for i, (norm, leaf) in enumerate(zip(norms, blocks_of("leaf", updates), strict=True)):
        assert (
            np.all(np.isnan(leaf))
            if i == 1 or counts_as_bad(norm, bound)
            else np.all(np.isfinite(leaf))
        )
