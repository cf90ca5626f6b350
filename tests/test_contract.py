"""What "correct" means: each test is a law that every case obeys, in every dtype."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from tests.cases import CASES, HARD
from tests.conftest import AS_USERS, allow

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# The bounds of these parts are checked where a part is built: test_parts.
PARTS = ("scheduled", "per_block", "until", "at_least")
each_case_with_a_bound, each_case_of_blocks = (
    pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
    for cases in (
        [case for case in CASES if case.name not in PARTS],
        [case for case in CASES if case.block != "element"],
    )
)
each_hard_case = pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
DTYPES = ["float32", "float16", "float64", "complex64", "mixed"]  # bfloat16 is in the mixed


def tree(dtype, scale=1.0, seed=0):
    """A small tree of one dtype, or of all of them."""
    rng = np.random.default_rng(seed)
    own = ["float32", "bfloat16", "float16"] if dtype == "mixed" else [dtype] * 3
    shapes = {"bias": (3,), "gain": (), "kernel": (4, 3)}

    def leaf(shape, dtype):
        x = rng.normal(size=shape) * scale
        x = x + 1j * rng.normal(size=shape) * scale if dtype.startswith("complex") else x
        return jnp.asarray(x, dtype)

    return {
        name: leaf(shape, dtype) for (name, shape), dtype in zip(shapes.items(), own, strict=True)
    }


def updater(tx, options=None):
    """One compiled update, from the first state; parameters are ones."""

    @functools.partial(jax.jit, compiler_options=options)
    def run(grads):
        params = jax.tree.map(jnp.ones_like, grads)
        return tx.update(grads, tx.init(params), params)

    return run


def update(tx, grads):
    return updater(tx)(grads)


def exact(x):
    """In NumPy, in twice the precision."""
    x = np.asarray(x)
    return x.astype(np.complex128) if np.iscomplexobj(x) else x.astype(np.float64)


def length(blocks, norm):
    """The norm of a list of arrays, in NumPy."""
    x = np.concatenate([np.abs(exact(b)).ravel() for b in blocks])
    return np.sqrt(np.mean(x**2)) if norm == "rms" else np.linalg.norm(x, norm)


def blocks(case, grads):
    """The blocks of a tree, as lists of arrays."""
    leaves = {name: exact(x) for name, x in grads.items()}
    if case.block == "tree":
        return [list(leaves.values())]
    if case.block == "leaf":
        return [[x] for x in leaves.values()]
    if case.block in ("unit", "layer"):
        # Columns of a kernel are its units; rows are its layers, stacked along the first axis.
        cut = {"unit": np.transpose, "layer": list}[case.block]
        parts = {name: cut(x) if name == "kernel" else [x] for name, x in leaves.items()}
        return [[x] for part in parts.values() for x in part]
    return [[x] for leaf in leaves.values() for x in leaf.ravel()]


def params_of_norm_one(case, grads):
    """Parameters whose every block has norm 1, so that a relative bound is an absolute one."""
    ones = jax.tree.map(jnp.ones_like, grads)
    size = {
        name: x.shape[0] if case.block == "unit" and name == "kernel" else max(x.size, 1)
        for name, x in ones.items()
    }
    return {name: x * jnp.asarray(size[name] ** -0.5, x.dtype) for name, x in ones.items()}


@each_hard_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_bound_nothing_changes_and_over_it_the_block_gets_that_long(case, dtype):
    with allow(dtype):
        grads = tree(dtype)
        params = params_of_norm_one(case, grads)
        longest = max(length(block, case.norm) for block in blocks(case, grads))

        # Compiled as users do for float32 only: a factor of 1 is the same program in all dtypes.
        @functools.partial(jax.jit, compiler_options=AS_USERS if dtype == "float32" else None)
        def run(bound):
            tx = case.make(bound)
            return tx.update(grads, tx.init(params), params)[0]

        untouched = run(longest * 1.1)
        chex.assert_trees_all_equal(untouched, grads)
        chex.assert_trees_all_equal_dtypes(untouched, grads)
        bound = longest / 3
        clipped = run(bound)
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, grads)
        eps = max(float(jnp.finfo(x.dtype).eps) for x in grads.values())
        for before, after in zip(blocks(case, grads), blocks(case, clipped), strict=True):
            norm = length(before, case.norm)
            rounded = 1 + (40 if case.relative else 4) * eps  # the parameters' norm is rounded, too
            assert length(after, case.norm) <= max(bound, 0) * rounded
            for x, y in zip(before, after, strict=True):
                np.testing.assert_allclose(
                    y, x * min(1, bound / norm), rtol=40 * eps, atol=eps * bound * 1e-2
                )


@each_case
def test_an_infinite_bound_changes_nothing(case):
    huge = jnp.full(2, 1e36 if case.units else 1e38)
    grads = {"kernel": tree("float32")["kernel"], "huge": huge, "tiny": jnp.full(2, 1e-37)}
    updates, _ = updater(case.make(jnp.inf), AS_USERS)(grads)
    chex.assert_trees_all_equal(updates, grads)


@each_case
def test_a_bound_of_zero_or_less_and_gradients_of_zero_give_zeros(case):
    """Only a traced bound can be negative; a concrete one is rejected by the next test."""
    grads = tree("mixed")
    zeros = jax.tree.map(np.zeros_like, grads)

    @jax.jit
    def sizes(bound, grads):
        params = jax.tree.map(jnp.ones_like, grads)
        tx = case.make(bound)
        updates, _ = tx.update(grads, tx.init(params), params)
        return jax.tree.map(jnp.abs, updates)

    for bound, g in ((0.0, zeros), (1.0, zeros), (0.0, grads), (-1.0, grads)):
        chex.assert_trees_all_equal(sizes(bound, g), zeros)
    assert any(np.any(x) for x in sizes(1.0, grads).values())


@each_case_with_a_bound
@pytest.mark.parametrize(
    "bound", [-1.0, float("nan"), "1.0", True, None, np.float32(-1), jnp.array(-1.0)], ids=repr
)
def test_an_invalid_bound_is_rejected(case, bound):
    with pytest.raises(ValueError, match=r"must be a number from 0 to inf"):
        case.make(bound)


@each_case_of_blocks
def test_a_block_that_is_not_finite_follows_the_policy(case):
    """Elements are clipped one by one: test_parts."""

    def clipped(grads, policy):
        updates, state = update(case.make(100.0, nonfinite=policy), grads)
        return updates, optaxclip.metrics(state)["clip/nonfinite_steps"]

    by_policy = jax.jit(lambda grads: [clipped(grads, way) for way in ("propagate", "zero")])

    for bad in (np.nan, np.inf, -np.inf):
        grads = tree("float32") | {"bias": np.float32([1.0, bad, 2.0])}
        (loud, seen_loud), (quiet, seen_quiet) = by_policy(grads)
        assert np.isnan(loud["bias"]).all() and (
            case.block != "tree" or np.isnan(loud["kernel"]).all()
        ), bad
        assert np.all(quiet["bias"] == 0) and np.all(np.isfinite(quiet["kernel"])), bad
        assert (case.block == "tree") == (not np.any(quiet["kernel"])), bad
        assert seen_loud == seen_quiet == 1, bad


@pytest.mark.slow
@each_hard_case
def test_any_magnitude_is_measured_accurately(case):
    @functools.partial(jax.jit, compiler_options=AS_USERS)
    def clipped(bound, grads):
        tx, params = case.make(bound), params_of_norm_one(case, grads)
        return tx.update(grads, tx.init(params), params)[0]

    for scale in (1e-30, 1e-20, 1e20, 1e30, 1e35 if case.units else 1e36):
        grads = tree("float32", scale)
        big = clipped(jnp.float32(0.1 * scale), grads)
        small = clipped(
            jnp.float32(0.1), jax.tree.map(lambda g, s=scale: (g / s).astype(g.dtype), grads)
        )
        got = jax.tree.map(lambda u, s=scale: u / s, big)
        chex.assert_trees_all_close(got, small, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    "grads", [{"w": jnp.full(2, 3e38)}, {"w": jnp.full(1, 3e38)}], ids=["norm", "factor"]
)
def test_a_norm_or_factor_outside_the_normal_floats_counts_as_not_finite(grads):
    loud, state = update(optaxclip.clip_by_global_norm(1.0), grads)
    assert np.isnan(loud["w"]).all() and optaxclip.metrics(state)["clip/nonfinite_steps"] == 1
    quiet, state = update(optaxclip.clip_by_global_norm(1.0, nonfinite="zero"), grads)
    assert not quiet["w"].any() and optaxclip.metrics(state)["clip/nonfinite_steps"] == 1


def test_the_smallest_beside_the_largest():
    mixed, _ = update(
        optaxclip.clip_by_global_norm(1.0), {"big": jnp.array([1e30]), "small": jnp.array([1e-30])}
    )
    assert mixed["big"] == 1.0 and mixed["small"] == 0.0


@pytest.mark.parametrize("scope", ["tree", "leaf", "units"])
def test_float32_beside_float64_is_as_accurate_as_alone(scope):
    """Neither the scales at which float64 is summed nor its factors fit in float32."""
    scopes = optaxclip.scopes
    scope = {"tree": scopes.tree, "leaf": scopes.leaf, "units": scopes.units()}[scope]
    with jax.enable_x64(True):
        step = updater(optaxclip.clip_by(1e-20, scope=scope))
        for scale in (1e-30, 1e-10, 1e10, 1e30):
            grads = {"single": jnp.full((4, 1), scale, jnp.float32), "double": jnp.zeros(3)}
            updates, state = step(grads)
            norm = jnp.max(jnp.hstack(jax.tree.leaves(state.metrics.grad_norm)))
            np.testing.assert_allclose(norm, 2 * scale, rtol=1e-6)
            np.testing.assert_allclose(updates["single"], min(0.5e-20, scale), rtol=1e-6)


def test_narrow_dtypes_where_optax_is_wrong():
    half = {"w": jnp.full(4, 300, jnp.float16)}
    np.testing.assert_allclose(
        update(optaxclip.clip_by_global_norm(1.0), half)[0]["w"], 0.5, rtol=1e-3
    )
    chex.assert_trees_all_equal(update(optaxclip.clip_by_global_norm(1e6), half)[0], half)
    many = [jnp.full(24, 0.01, jnp.bfloat16)] * 100
    norm = update(optaxclip.clip_by(jnp.inf), many)[1].metrics.grad_norm
    np.testing.assert_allclose(norm, float(jnp.bfloat16(0.01)) * 2400**0.5, rtol=1e-5)
    eighth = {"w": jnp.full(400, 2, jnp.float8_e4m3fn)}
    np.testing.assert_allclose(
        update(optaxclip.clip_by(jnp.inf), eighth)[1].metrics.grad_norm, 40.0
    )


def test_a_clip_of_ninety_thousand_numbers_is_exact_to_rounding():
    x = jnp.asarray(np.random.default_rng(0).normal(size=90_000), jnp.bfloat16)
    _, state = update(optaxclip.clip_by(jnp.inf), {"w": x})
    np.testing.assert_allclose(state.metrics.grad_norm, np.linalg.norm(np.float64(x)), rtol=1e-6)


@each_case
def test_non_gradients_pass_through(case):
    others = {
        "count": jnp.arange(3),
        "flags": jnp.array([True, False]),
        "zero_bits": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
    }
    grads = {"kernel": jnp.full((4, 3), 2.0), "nothing": jnp.zeros((0, 3)), **others}
    tx = case.make(1.0)
    updates, state = tx.update(grads, tx.init(grads), jax.tree.map(lambda x: x, grads))
    for name in ("count", "flags", "key"):
        assert updates[name] is grads[name]
    assert updates["zero_bits"].dtype == jax.dtypes.float0 and updates["none"] is None
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert np.all(np.isfinite(updates["kernel"])) and updates["nothing"].shape == (0, 3)
    empty, _ = tx.update({}, tx.init({}), {})
    assert empty == {}


def test_weak_types_are_kept():
    for case in CASES:
        x = {"kernel": jnp.broadcast_to(jnp.asarray(3.0), (1, 1))}
        tx = case.make(1.0)
        updates, _ = tx.update(x, tx.init(x), x)
        assert updates["kernel"].weak_type, case.name


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for i, case in enumerate(CASES)
        for dtype in ("mixed", ("float32", "bfloat16")[i % 2])
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_state_keeps_its_structure_in_scan_cond_and_donation(case, dtype):
    tx, grads = case.make(1.0), tree(dtype)
    params = jax.tree.map(jnp.ones_like, grads)

    def step(state, i):
        updates, new = tx.update(grads, state, params)
        new = jax.lax.cond(i % 2 == 0, lambda: new, lambda: state)
        return new, optaxclip.metrics(new)["clip/steps"]

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(4)), donate_argnums=0)
    state, steps = run(tx.init(params))
    assert steps.tolist() == [1, 1, 2, 2]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


@each_case
def test_compiles_once_for_all_bounds_and_steps(case):
    grads = tree("float32")
    params = jax.tree.map(jnp.ones_like, grads)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(bound, state, grads):
        return case.make(bound).update(grads, state, params)

    state = case.make(1.0).init(params)
    for bound in (1.0, 2.0, 0.0):
        _, state = step(bound, state, grads)


@each_case
def test_derivatives_are_finite_and_correct(case):
    tx = case.make(1.0)
    grads = {"kernel": tree("float32")["kernel"]}
    params = jax.tree.map(jnp.ones_like, grads)

    def through(x, scale=1.0):
        updates, _ = tx.update({"kernel": x * scale}, tx.init(params), params)
        return jnp.sum(jnp.sin(updates["kernel"]))

    derivative = jax.jit(jax.grad(through))
    at_zero = derivative(jnp.zeros((4, 3)), 1.0)
    assert np.all(np.isfinite(at_zero)) and (not case.hard or np.allclose(at_zero, 1))
    chex.assert_tree_all_finite(derivative(grads["kernel"], 1e30))

    @jax.jit
    def along(x, direction):
        _, forward = jax.jvp(through, (x,), (direction,))
        ahead, behind = jax.vmap(lambda step: through(x + step * direction))(
            jnp.array([0.01, -0.01])
        )
        return forward, (ahead - behind) / 0.02

    x, direction = grads["kernel"] * 0.7, tree("float32", seed=1)["kernel"]
    forward, slope = along(x, direction)
    np.testing.assert_allclose(forward, slope, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(jnp.sum(derivative(x, 1.0) * direction), forward, rtol=1e-4)


@each_case
def test_vmap_over_the_bound_and_the_gradients(case):
    grads = jnp.stack([jnp.full((4, 3), 2.0), jnp.full((4, 3), 1e-3), jnp.full((4, 3), 1e25)])
    params = jnp.ones((4, 3))

    def one(bound, g):
        tx = case.make(bound)
        return tx.update(g, tx.init(params), params)[0]

    bounds = jnp.array([0.5, 1.0, 2.0])
    alone = jax.jit(one)
    want = jnp.stack([alone(b, g) for b, g in zip(bounds, grads, strict=True)])
    chex.assert_trees_all_close(jax.jit(jax.vmap(one))(bounds, grads), want, rtol=1e-6)


@each_case
def test_update_without_a_state(case):
    grads = tree("float32")
    params = jax.tree.map(jnp.ones_like, grads)
    tx = case.make(1.0)
    if case.history:
        with pytest.raises(ValueError, match=r"state = tx.init\(params\)"):
            tx.update(grads, None, params)
    else:

        @jax.jit
        def both(grads):
            return [tx.update(grads, s, params)[0] for s in (None, tx.init(params))]

        chex.assert_trees_all_equal(*both(grads))


@each_case
def test_missing_parameters_are_asked_for(case):
    grads = tree("float32")
    tx = case.make(1.0)
    if case.relative:
        with pytest.raises(ValueError, match=r"write tx.update\(grads, state, params\)"):
            tx.update(grads, tx.init(grads))
    else:
        tx.update(grads, tx.init(grads))


def test_a_tree_that_init_did_not_see_is_named():
    tx = optaxclip.clip_by_leaf_norm(1.0)
    with pytest.raises(ValueError, match=r"new are \['b'\], missing are \['a'\]"):
        tx.update({"b": jnp.ones(2)}, tx.init({"a": jnp.ones(2)}))


def test_the_state_of_another_scope_is_named():
    grads = {"a": jnp.ones(2)}
    whole, by_leaf = optaxclip.clip_by(1.0), optaxclip.clip_by(1.0, scope=optaxclip.scopes.leaf)
    for tx, other in ((whole, by_leaf), (by_leaf, whole)):
        with pytest.raises(ValueError, match="the state of a clip with another scope"):
            tx.update(grads, other.init(grads))


@pytest.mark.parametrize("make", [optaxclip.clip_by, optaxclip.clip, optaxclip.spectral_clip])
@pytest.mark.parametrize(
    ("state", "name"),
    [
        (optax.EmptyState(), "EmptyState"),
        ((optax.EmptyState(), ()), r"\(EmptyState, \(\)\)"),
        ({}, "dict"),
    ],
)
def test_a_foreign_state_is_named(make, state, name):
    with pytest.raises(
        ValueError, match=f"not a state of .*clip.* but {name}: .*docs/old-checkpoints.md"
    ):
        make(1.0).update({"a": jnp.ones(2)}, state)


def test_a_state_may_have_another_type_with_the_same_fields():
    tx, grads = optaxclip.clip_by(1.0), {"a": jnp.ones(2)}
    state = tx.init(grads)
    rebuilt = collections.namedtuple("Rebuilt", state._fields)(*state)
    chex.assert_trees_all_equal(tx.update(grads, rebuilt)[0], tx.update(grads, state)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "skip"}, "nonfinite must be .*'skip'"),
        ({"norm": 0.5}, "norm must be .* or a number p from 1 to inf, got 0.5"),
        ({"norm": "l2"}, r"norm must be norms\.l2, .*got 'l2'"),
        (
            {"scope": "layer"},
            r"scope must be scopes\.tree, scopes\.leaf, scopes\.groups\(...\),"
            r" scopes\.stacked\(...\), scopes\.units\(...\) or scopes\.element, got 'layer'",
        ),
        ({"scope": optaxclip.scopes.groups}, r"scope must be .*: write groups\("),
        ({"scope": optaxclip.scopes.units}, r"scope must be .*: write units\("),
        ({"action": "zero"}, r"action must be actions\.rescale, .*got 'zero'"),
        ({"action": optaxclip.actions.smooth}, r"action must be .*: write smooth\("),
        ({"action": optaxclip.actions.band}, r"action must be .*: write band\("),
        ({"exclude": ["a"]}, r"exclude must be a regular expression .*got the list \['a'\]"),
    ],
)
def test_unknown_parts_are_rejected(options, message):
    with pytest.raises(ValueError, match=f"clip_by: {message}"):
        optaxclip.clip_by(1.0, **options)
