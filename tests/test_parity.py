"""The same results as in other frameworks that people come from, compared with the framework
itself if it is installed.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

RNG = np.random.default_rng(0)
GRADS = {
    "b": RNG.normal(size=3).astype("float32"),
    "w": RNG.normal(size=(4, 3)).astype("float32") * 3,
}
PARAMS = {"b": RNG.normal(size=3).astype("float32"), "w": RNG.normal(size=(4, 3)).astype("float32")}


def ours(tx):
    return jax.jit(lambda: tx.update(GRADS, tx.init(PARAMS), PARAMS)[0])()


def close(got, want, rtol=2e-6):
    for name in GRADS:
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(want[name]), rtol=rtol)


PAIRS = {
    "clip": (optaxclip.clip, optax.clip),
    "clip_by_global_norm": (optaxclip.clip_by_global_norm, optax.clip_by_global_norm),
    "clip_by_block_rms": (optaxclip.clip_by_block_rms, optax.clip_by_block_rms),
    "adaptive_grad_clip": (optaxclip.adaptive_grad_clip, optax.adaptive_grad_clip),
    "adaptive_grad_clip axis": (
        lambda c: optaxclip.adaptive_grad_clip(c, 1e-2, axis=0),
        lambda c: optax.adaptive_grad_clip(c, 1e-2, axis=0),
    ),
}


@pytest.mark.parametrize(("own", "theirs"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("bound", [0.01, 1.0, 100.0])
def test_optax(own, theirs, bound):
    close(ours(own(bound)), ours(theirs(bound)))


@pytest.mark.parametrize("name", ["per_example_global_norm_clip", "per_example_layer_norm_clip"])
@pytest.mark.parametrize("bound", [0.0, 1.0, 2.0, jnp.inf])
def test_optax_per_example(name, bound):
    grads = jax.tree.map(lambda g: np.stack([g, g * 0.1, g * 2]), GRADS)

    @jax.jit
    def both(grads):
        return [getattr(module, name)(grads, bound) for module in (optaxclip, optax)]

    got, want = both(grads)
    close(got[0], want[0], rtol=1e-5)
    assert jax.tree.map(int, got[1]) == jax.tree.map(int, want[1])


@pytest.mark.parametrize(
    "shape", [(), (5,), (4, 3), (2, 3, 4), (2, 2, 3, 4), (2, 2, 2, 3, 4), (1, 5)]
)
def test_optax_units(shape):
    def both(x):
        norm = optax.transforms.unitwise_norm(x)
        limit = jnp.full_like(norm, 0.5)
        own = optaxclip.unitwise_norm(x), optaxclip.unitwise_clip(norm, limit, x)
        return own, (norm, optax.transforms.unitwise_clip(norm, limit, x))

    own, theirs = jax.jit(both)(jnp.asarray(RNG.normal(size=shape), jnp.float32))
    chex.assert_trees_all_close(own, theirs, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (1, 2), ()], ids=str)
def test_units_of_any_axes(axis):
    x = RNG.normal(size=(3, 3, 3)).astype("float32")
    want = np.sqrt(np.sum(np.square(x), axis=axis, keepdims=True))
    np.testing.assert_allclose(
        optaxclip.unitwise_norm(x, axis), np.broadcast_to(want, x.shape), rtol=1e-6
    )


KERAS = {
    "clipnorm": optaxclip.clip_by_leaf_norm,
    "global_clipnorm": optaxclip.clip_by_global_norm,
    "clipvalue": optaxclip.clip,
}


@pytest.mark.filterwarnings("ignore")  # Keras's own warnings
@pytest.mark.parametrize("argument", KERAS)
@pytest.mark.parametrize("bound", [0.7, 100.0])
def test_keras(argument, bound):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        keras = pytest.importorskip("keras")
        assert keras.backend.backend() == "jax"
        variables = {name: keras.Variable(np.zeros_like(g)) for name, g in GRADS.items()}
        optimizer = keras.optimizers.SGD(1.0, **{argument: bound})
        optimizer.apply([jnp.asarray(g) for g in GRADS.values()], list(variables.values()))
        moved = {name: -np.asarray(variable) for name, variable in variables.items()}
    close(ours(KERAS[argument](bound)), moved, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("bound", [0.7, 100.0])
def test_torch_norm(p, bound):
    torch = pytest.importorskip("torch")
    leaves = {name: torch.nn.Parameter(torch.zeros(g.shape)) for name, g in GRADS.items()}
    for name, g in GRADS.items():
        leaves[name].grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(leaves.values(), bound, norm_type=p)
    tx = optaxclip.clip_by_global_norm(bound, norm=p, eps=1e-6)
    close(ours(tx), {name: leaf.grad.numpy() for name, leaf in leaves.items()})
    _, state = tx.update(GRADS, tx.init(PARAMS))
    np.testing.assert_allclose(optaxclip.metrics(state)["clip/grad_norm"], float(norm), rtol=1e-6)


def test_torch_value():
    torch = pytest.importorskip("torch")
    leaf = torch.nn.Parameter(torch.zeros(4, 3))
    leaf.grad = torch.tensor(GRADS["w"])
    torch.nn.utils.clip_grad_value_([leaf], 0.7)
    np.testing.assert_array_equal(ours(optaxclip.clip(0.7))["w"], leaf.grad.numpy())


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 10, jnp.inf])
def test_numpy_and_torch_formula(p):
    norm = np.linalg.norm(np.concatenate([g.ravel() for g in GRADS.values()]).astype(float), p)
    factor = min(1.0, 0.7 / (norm + 1e-6))
    close(
        ours(optaxclip.clip_by_global_norm(0.7, norm=p, eps=1e-6)),
        {k: g * factor for k, g in GRADS.items()},
    )
