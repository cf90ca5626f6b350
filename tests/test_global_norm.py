"""`global_norm` is the norm that `clip_by_global_norm` clips by, for any tree, on any mesh.

`test_agree.py` has this for every p.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from tests.conftest import AS_USERS, allow

DTYPES = ["float32", "bfloat16", "float16", "float64", "complex64"]
RTOL = {"float64": 1e-14}


def tree(dtype, scale=1.0):
    """Leaves of equal and of other shapes in one dtype, and a float32 scalar."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        x = rng.normal(size=shape) * scale
        return jnp.asarray(x + 1j * x if dtype.startswith("complex") else x, dtype)

    layers = {str(i): {"kernel": leaf(4, 3), "bias": leaf(3)} for i in range(3)}
    return layers | {"scale": jnp.float32(scale)}


def exact(grads):
    """In NumPy, in twice the precision."""
    leaves = [np.abs(np.asarray(x).astype(np.complex128)).ravel() for x in jax.tree.leaves(grads)]
    return np.linalg.norm(np.concatenate(leaves))


def measured(grads, **options):
    """The norm that the clip records."""
    tx = oc.clip_by_global_norm(1.0, **options)
    return oc.metrics(tx.update(grads, tx.init(grads))[1])["clip/grad_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_matches_the_clip_and_numpy_in_every_dtype(dtype):
    with allow(dtype):
        grads = tree(dtype)
        norm = oc.global_norm(grads)
        assert norm == measured(grads) and norm.shape == ()
        assert norm.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        np.testing.assert_allclose(norm, exact(grads), rtol=RTOL.get(dtype, 1e-6))
        assert oc.global_norm(grads, exclude="kernel") == measured(grads, exclude="kernel") < norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_it_is_accurate_at_any_magnitude(dtype):
    norm = jax.jit(oc.global_norm)
    for scale in (1e-36, 1e-20, 1e20, 1e36):
        grads = tree(dtype, scale)
        np.testing.assert_allclose(norm(grads), exact(grads), rtol=1e-6)


def test_a_norm_that_overflows_its_dtype_is_accurate():
    """In float16 300 elements of 250 overflow; in bfloat16 a running sum of ones stops at 256."""
    assert oc.global_norm(jnp.full(300, 250.0, jnp.float16)) == np.float32(250 * 300**0.5)
    assert oc.global_norm([jnp.ones(16, jnp.bfloat16)] * 64) == 32


def test_non_floating_leaves_do_not_count():
    rest = {"step": jnp.int32(7), "mask": jnp.ones(2, bool), "none": None, "name": "net"}
    rest |= {"activation": jnp.tanh, "empty": jnp.zeros((0, 3)), "key": jax.random.key(0)}
    assert oc.global_norm({"w": jnp.array([3.0, 4.0])} | rest) == 5
    assert oc.global_norm({}) == oc.global_norm({"step": 3}) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_propagate(bad):
    grads = {"a": jnp.array([1.0, bad]), "b": jnp.ones(2, jnp.bfloat16)}
    np.testing.assert_equal(float(oc.global_norm(grads)), abs(bad))


def test_it_has_a_derivative_everywhere():
    """g / ‖g‖, and 0 at 0, even where squares overflow or underflow."""
    grad = jax.jit(jax.grad(oc.global_norm))
    for scale in (1.0, 1e-30, 1e30):
        np.testing.assert_allclose(grad(scale * jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    assert not grad(jnp.zeros(2)).any()


@pytest.mark.parametrize("norm", [1, 1.5, 3, np.inf, oc.norms.rms], ids=str)
def test_each_norm_has_its_derivative(norm):
    x = jnp.array([3.0, -4.0, 1.0])
    p, scale = (2, 3**-0.5) if norm is oc.norms.rms else (norm, 1)
    want = jax.grad(lambda x: scale * jnp.linalg.norm(x, p))(x)
    np.testing.assert_allclose(jax.grad(lambda x: oc.global_norm(x, norm=norm))(x), want, rtol=1e-5)


LAYOUT = {"in": P("x", "y"), "out": P("y"), "bias": P()}
GRADS = {
    "in": jnp.arange(32.0).reshape(8, 4) - 9,
    "out": jnp.arange(32.0).reshape(8, 4) / 3,
    "bias": jnp.arange(4.0),
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_under_jit_it_is_the_norm_of_whole_arrays_without_a_gather(kind):
    mesh = mesh_of(kind)
    put = {k: jax.device_put(g, NamedSharding(mesh, LAYOUT[k])) for k, g in GRADS.items()}
    compiled = jax.jit(oc.global_norm).lower(put).compile(AS_USERS)
    np.testing.assert_allclose(compiled(put), exact(GRADS), rtol=1e-6)
    assert "all-reduce" in compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())


@pytest.mark.parametrize("told", [False, True])
def test_in_shard_map_it_is_the_norm_of_all_parts_and_copies_count_once(told):
    names = {"in": ("x", "y"), "out": ("y",), "bias": ()} if told else None
    norm = partial(oc.global_norm, axis_names=names)
    mesh = mesh_of(AxisType.Auto)
    run = jax.shard_map(norm, mesh=mesh, in_specs=(LAYOUT,), out_specs=P(), check_vma=not told)
    np.testing.assert_allclose(jax.jit(run)(GRADS), exact(GRADS), rtol=1e-6)


def test_where_types_are_silent_it_asks_and_under_pmap_it_takes_the_name():
    rows = GRADS["in"]
    with pytest.raises(ValueError, match=r"^global_norm: .*axis_names="):
        jax.pmap(oc.global_norm, axis_name="i")(rows)
    norms = jax.pmap(partial(oc.global_norm, axis_names="i"), axis_name="i")(rows)
    np.testing.assert_allclose(norms, [exact(rows)] * 8, rtol=1e-6)
