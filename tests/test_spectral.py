"""Singular values are clipped as a decomposition in NumPy would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip as oc

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (8, 8), "column": (9, 1)}
METHODS = ["hard", "soft"]


def spectra(count):
    """Singular values: of all sizes, nearly all 0, at the bound, a large spike."""
    yield np.geomspace(1e-6, 100, count)
    yield np.r_[np.zeros(count - 1), 5.0]
    yield np.r_[np.ones(count - 1), 300.0]
    yield 1 + 1e-3 * np.arange(count)


def matrix(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return (u * values) @ v.T


def decomposed(x, bound, method):
    u, s, v = np.linalg.svd(np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), full_matrices=False)
    s = np.minimum(s, bound) if method == "hard" else s / np.sqrt(1 + (s / bound) ** 2)
    return (u * s) @ v


def clipped(tx, grads):
    return jax.jit(tx.update)(grads, tx.init(grads))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", ["polar", "svd"])
def test_singular_values_are_clipped(method, solver):
    grads = {
        f"{name} {i}": jnp.asarray(matrix(shape, values), jnp.float32)
        for name, shape in SHAPES.items()
        for i, values in enumerate(spectra(min(shape)))
    }
    updates = clipped(oc.spectral_clip(1.0, method=method, solver=solver), grads)
    for name, x in grads.items():
        assert np.linalg.norm(updates[name] - decomposed(x, 1.0, method), 2) < 1e-4, name


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_any_scale(scale, method):
    x = matrix((7, 4), np.array([5.0, 2.0, 1.0, 0.1]))
    got = clipped(oc.spectral_clip(1.5 * scale, method=method), jnp.asarray(x * scale, jnp.float32))
    np.testing.assert_allclose(np.float64(got) / scale, decomposed(x, 1.5, method), atol=1e-4)


def test_stacked_layers_and_kernels():
    """Leading axes stack matrices where the caller says so; all axes between are one side of a matrix."""
    rng = np.random.default_rng(0)
    stack, kernel = rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 3, 2, 4))
    grads = {"layers": jnp.asarray(stack, jnp.float32), "conv": jnp.asarray(kernel, jnp.float32)}
    tx = oc.spectral_clip(1.0, batch_axes=lambda path: 1 if path == "layers" else 0)
    updates = clipped(tx, grads)
    for got, x in zip(updates["layers"], stack, strict=True):
        np.testing.assert_allclose(got, decomposed(x, 1.0, "hard"), atol=1e-4)
    np.testing.assert_allclose(
        updates["conv"].reshape(18, 4), decomposed(kernel.reshape(18, 4), 1.0, "hard"), atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)) + (1j * rng.normal(size=(6, 4)) if dtype == "complex64" else 0)
    grads = jnp.asarray(x, dtype)
    updates = clipped(oc.spectral_clip(1.0), grads)
    assert updates.dtype == grads.dtype
    want = decomposed(np.asarray(grads, np.complex64 if dtype == "complex64" else np.float32), 1.0, "hard")
    np.testing.assert_allclose(np.asarray(updates, want.dtype), want, atol=1e-4 if dtype == "complex64" else 1e-2)


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(matrix((7, 4), np.array([5.0, 2.0, 1.0, 0.1])))
        updates = clipped(oc.spectral_clip(1.5), x)
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, decomposed(x, 1.5, "hard"), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_corners(method):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    def at(bound, grads=x, **options):
        return clipped(oc.spectral_clip(bound, method=method, **options), grads)

    np.testing.assert_array_equal(at(jnp.inf), x)
    np.testing.assert_array_equal(at(0.0), 0)
    np.testing.assert_array_equal(at(1.0, jnp.zeros((4, 3))), 0)
    if method == "hard":
        np.testing.assert_array_equal(at(100.0), x)  # bit for bit
    bad = {"bad": x.at[0, 0].set(jnp.nan), "good": x}
    loud, quiet = at(1.0, bad), at(1.0, bad, nonfinite="zero")
    assert np.isnan(loud["bad"]).all() and np.isfinite(loud["good"]).all()
    assert not quiet["bad"].any() and quiet["good"].any()
    vector = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(
        at(1.0, vector), vector / 5 * (1 if method == "hard" else 1 / np.sqrt(1 + 1 / 25)), rtol=1e-4
    )


def test_the_norm_in_the_metrics_is_the_largest_singular_value():
    grads = {"a": jnp.asarray(matrix((9, 6), np.array([3.0, 1.0, 0.5, 0.1])), jnp.float32), "b": jnp.array([3.0, 4.0])}
    tx = oc.spectral_clip(oc.running(1.5))
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update(grads, state)
    seen = oc.metrics(state)
    np.testing.assert_allclose([seen["clip/grad_norm/a"], seen["clip/grad_norm/b"]], [3.0, 5.0], rtol=1e-3)
    np.testing.assert_allclose([seen["clip/bound/a"], seen["clip/bound/b"]], [4.5, 7.5], rtol=1e-3)


@pytest.mark.parametrize("argument", [{"method": "medium"}, {"solver": "qr"}, {"max_singular_value": -1.0}])
def test_what_does_not_exist_is_refused(argument):
    with pytest.raises(ValueError, match=f"spectral_clip: {next(iter(argument))} must be"):
        oc.spectral_clip(**({"max_singular_value": 1.0} | argument))
