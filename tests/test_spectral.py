"""`spectral_clip` against a singular value decomposition in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from tests.conftest import AS_USERS

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (8, 8), "column": (9, 1)}
METHODS = ["hard", "soft"]


def spectra(count):
    """Singular values over eight decades, nearly all zero, at the bound, with a spike, and close to
    the bound.
    """
    yield np.geomspace(1e-6, 100, count)
    yield np.r_[np.zeros(count - 1), 5.0]
    yield np.r_[np.ones(count - 1), 300.0]
    yield np.r_[np.linspace(0.5, 2, count - 1), 3e4]
    yield np.r_[np.full(count // 2, 0.01), 1 + 1e-3 * np.arange(count - count // 2)]
    yield 1 + 1e-3 * np.arange(count)


def matrix(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return (u * values) @ v.T


def decomposed(x, bound, method):
    u, s, v = np.linalg.svd(
        np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), full_matrices=False
    )
    s = np.minimum(s, bound) if method == "hard" else s / np.sqrt(1 + (s / bound) ** 2)
    return (u * s[..., None, :]) @ v


def clipped(tx, grads, options=None):
    return jax.jit(tx.update, compiler_options=options)(grads, tx.init(grads))[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", ["polar", "svd"])
def test_singular_values_are_clipped(method, solver):
    grads = {
        name: jnp.asarray(
            np.stack([matrix(shape, values) for values in spectra(min(shape))]), jnp.float32
        )
        for name, shape in SHAPES.items()
    }
    updates = clipped(oc.spectral_clip(1.0, method=method, solver=solver, stacked=""), grads)
    for name, stack in grads.items():
        error = np.linalg.norm(updates[name] - decomposed(stack, 1.0, method), 2, axis=(1, 2))
        assert (error < np.maximum(1e-4, 1e-7 * np.linalg.norm(stack, axis=(1, 2)))).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_large_matrices(method):
    """Many small singular values do not slow the convergence of the large ones."""
    values = np.r_[np.full(40, 0.01), np.linspace(0.99, 1.01, 23), 900.0]
    x = jnp.asarray(matrix((80, 64), values), jnp.float32)
    error = clipped(oc.spectral_clip(1.0, method=method), x) - decomposed(x, 1.0, method)
    assert np.linalg.norm(error, 2) < 1e-4


@pytest.mark.slow
def test_more_steps_reach_further():
    x = jnp.asarray(matrix((6, 4), np.array([1e4, 2.0, 1.0, 0.5])), jnp.float32)
    few, many = (
        np.linalg.norm(clipped(oc.spectral_clip(1.0, steps=n), x) - decomposed(x, 1.0, "hard"))
        for n in (6, 11)
    )
    assert many < 1e-3 < 0.1 < few


@pytest.mark.parametrize("method", METHODS)
def test_any_scale(method):
    x = matrix((7, 4), np.array([5.0, 2.0, 1.0, 0.1]))

    @jax.jit
    def clip(grads, bound):
        updates, state = oc.spectral_clip(bound, method=method).update(grads, None)
        return updates, oc.metrics(state)["clip/grad_norm"]

    for scale in [1e-35, 1e-3, 1e30, 5e37]:
        got, norm = clip(jnp.asarray(x * scale, jnp.float32), jnp.float32(1.5 * scale))
        np.testing.assert_allclose(float(norm) / scale, 5, rtol=1e-3)
        np.testing.assert_allclose(np.float64(got) / scale, decomposed(x, 1.5, method), atol=1e-4)


def test_stacked_layers_and_kernels():
    """Leading axes number layers only where `stacked` says so; otherwise all axes but the last are
    the rows of one matrix.
    """
    rng = np.random.default_rng(0)
    stack, kernel = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 3, 2, 4))
    grads = {"layers": jnp.asarray(stack, jnp.float32), "conv": jnp.asarray(kernel, jnp.float32)}
    tx = oc.spectral_clip(1.0, stacked="layers")
    updates = clipped(tx, grads)
    for got, x in zip(updates["layers"], stack, strict=True):
        np.testing.assert_allclose(got, decomposed(x, 1.0, "hard"), atol=1e-4)
    np.testing.assert_allclose(
        updates["conv"].reshape(18, 4), decomposed(kernel.reshape(18, 4), 1.0, "hard"), atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)) + (1j * rng.normal(size=(6, 4)) if dtype == "complex64" else 0)
    grads = jnp.asarray(x, dtype)
    updates = clipped(oc.spectral_clip(1.0), grads)
    assert updates.dtype == grads.dtype
    assert (clipped(oc.spectral_clip(100.0), grads, AS_USERS) == grads).all()
    want = decomposed(
        np.asarray(grads, np.complex64 if dtype == "complex64" else np.float32), 1.0, "hard"
    )
    np.testing.assert_allclose(
        np.asarray(updates, want.dtype), want, atol=1e-4 if dtype == "complex64" else 1e-2
    )


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(matrix((7, 4), np.array([5.0, 2.0, 1.0, 0.1])))
        updates = clipped(oc.spectral_clip(1.5), x)
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, decomposed(x, 1.5, "hard"), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_edge_cases(method):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    def at(bound, grads=x, compiled=None, **options):
        return clipped(oc.spectral_clip(bound, method=method, **options), grads, compiled)

    np.testing.assert_array_equal(at(jnp.inf, compiled=AS_USERS), x)
    np.testing.assert_array_equal(at(0.0), 0)
    traced = jax.jit(lambda bound: clipped(oc.spectral_clip(bound, method=method), x))
    np.testing.assert_array_equal(traced(jnp.float32(-1)), 0)  # a tracer cannot be rejected
    np.testing.assert_array_equal(at(1.0, jnp.zeros((4, 3))), 0)
    if method == "hard":
        np.testing.assert_array_equal(at(100.0, compiled=AS_USERS), x)  # bit for bit
    bad = {"bad": x.at[0, 0].set(jnp.nan), "good": x}
    loud, quiet = at(1.0, bad), at(1.0, bad, nonfinite="zero")
    assert np.isnan(loud["bad"]).all() and np.isfinite(loud["good"]).all()
    assert not quiet["bad"].any() and quiet["good"].any()
    vector = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(
        at(1.0, vector),
        vector / 5 * (1 if method == "hard" else 1 / np.sqrt(1 + 1 / 25)),
        rtol=1e-6,
    )


def test_the_norm_in_the_metrics_is_the_largest_singular_value():
    grads = {
        "a": jnp.asarray(matrix((9, 6), np.array([3.0, 1.0, 0.5, 0.1])), jnp.float32),
        "b": jnp.array([3.0, 4.0]),
    }
    tx = oc.spectral_clip(oc.thresholds.running(1.5))
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update(grads, state)
    seen = oc.metrics(state)
    np.testing.assert_allclose(
        [seen["clip/grad_norm/a"], seen["clip/grad_norm/b"]], [3.0, 5.0], rtol=1e-3
    )
    np.testing.assert_allclose([seen["clip/bound/a"], seen["clip/bound/b"]], [4.5, 7.5], rtol=1e-3)


BAD = [
    {"method": "medium"},
    {"solver": "qr"},
    {"nonfinite": "skip"},
    {"steps": 4},
    {"max_singular_value": -1.0},
]


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments_are_rejected(argument):
    with pytest.raises(ValueError, match=r"spectral_clip: .*(must be|is none of)"):
        oc.spectral_clip(**({"max_singular_value": 1.0} | argument))


def test_the_norm_is_found_where_the_longest_row_misleads():
    """One row of norm 2, orthogonal to a hundred parallel rows of norm 1 (singular value 10)."""
    rows = jnp.zeros((101, 3)).at[0, 0].set(2.0).at[1:, 1].set(1.0)
    tx = oc.spectral_clip(1.0)
    _, state = tx.update(rows, tx.init(rows))
    np.testing.assert_allclose(oc.metrics(state)["clip/grad_norm"], 10.0, rtol=1e-3)


def test_in_scan_the_state_keeps_its_form_and_nothing_is_compiled_twice():
    grads = {
        "a": jnp.ones((4, 3), jnp.bfloat16),
        "b": jnp.ones(2),
        "empty": jnp.zeros((0, 3)),
        "count": jnp.arange(3),
    }
    tx = oc.spectral_clip(lambda step: jnp.array([1.0, 2.0])[step])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(state):
        return jax.lax.scan(lambda state, _: tx.update(grads, state)[::-1], state, None, length=2)

    start = tx.init(grads)
    state, updates = run(start)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(lambda u: u[0], updates), grads)
    norms = [np.linalg.norm(np.float32(u), 2) for u in updates["a"]]
    np.testing.assert_allclose(norms, [1, 2], rtol=1e-2)
    run(state)


@pytest.mark.parametrize("method", METHODS)
def test_the_derivative_is_finite(method):
    tx = oc.spectral_clip(1.0, method=method)
    x = jnp.asarray(matrix((4, 3), np.array([5.0, 1.0, 0.1])), jnp.float32)
    slope = jax.jit(jax.jacobian(lambda g: tx.update(g, None)[0]))
    assert np.isfinite(slope(x)).all()
    np.testing.assert_allclose(slope(jnp.zeros((4, 3))).reshape(12, 12), np.eye(12), atol=1e-5)


def test_stacked_by_vmap_or_by_axis():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32).at[1].mul(1e5)
    mapped = jax.vmap(lambda g: oc.spectral_clip(1.0).update(g, None)[0])(stack)
    np.testing.assert_allclose(mapped, clipped(oc.spectral_clip(1.0, stacked=""), stack), atol=1e-5)


def test_a_bound_may_follow_the_parameters():
    params = jnp.asarray(matrix((5, 4), np.array([8.0, 4.0, 2.0, 1.0])), jnp.float32)
    tx = oc.spectral_clip(oc.thresholds.param_relative(0.5, 1e-3))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates, 2), 4.0, rtol=1e-3)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


SPECS = {
    "both": P("x", "y"),
    "one": P(None, ("x", "y")),
    "layers": P(None, "y"),
    "whole": P(),
}


@pytest.mark.parametrize("typed", [True, False])
def test_sharded_matrices_are_clipped_as_whole_ones_in_shard_map(typed):
    rng = np.random.default_rng(0)
    shapes = {"both": (6, 4), "one": (3, 8), "layers": (2, 4, 3), "whole": (5,)}
    grads = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    bound = oc.thresholds.running(0.5, feed=oc.feeds.raw)

    alone = oc.spectral_clip(bound, solver="svd", stacked="layers")  # compiles in less time
    apart = oc.spectral_clip(bound, solver="svd", stacked="layers", specs=SPECS)
    first = jax.jit(alone.update)
    _, state = first(grads, alone.init(grads))
    want = first(grads, state)
    run = jax.shard_map(
        apart.update,
        mesh=Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y")),
        in_specs=(SPECS, P()),
        out_specs=(SPECS, P()),
        check_vma=typed,
    )
    got = jax.jit(run)(grads, state)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[0]["both"], grads["both"], atol=0.1)


def test_invalid_or_incomplete_specs_are_rejected():
    with pytest.raises(ValueError, match="specs must be a PartitionSpec, a function of the path"):
        oc.spectral_clip(1.0, specs={"a": "x"})
    with pytest.raises(ValueError, match=r"spectral_clip: specs must .* for 'b', got \['a'\]"):
        oc.spectral_clip(1.0, specs={"a": P()}).update({"b": jnp.ones((2, 2))}, None)


def test_layers_on_several_devices_are_rejected():
    run = jax.shard_map(
        lambda g: oc.spectral_clip(1.0, stacked="", specs=P("x")).update(g, None)[0],
        mesh=Mesh(np.array(jax.devices()[:2]), ("x",)),
        in_specs=P("x"),
        out_specs=P("x"),
    )
    with pytest.raises(ValueError, match=r"specs must not cut the leaf .* between its layers"):
        run(jnp.ones((4, 3, 2)))
