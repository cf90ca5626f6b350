"""Per-example clipping: each method agrees with a slow loop over the examples, for every loss."""

import functools
import operator

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip import per_example, xla
from optaxclip.per_example.weights import weigh
from tests.benchmarks import per_example as benchmark
from tests.conftest import AS_USERS

B = 5
WAYS = {
    "ghost": {"method": "ghost"},
    "ghost, 2 at a time": {"method": "ghost", "microbatch_size": 2},
    "microbatch": {"method": "microbatch"},
    "microbatch of 2": {"method": "microbatch", "microbatch_size": 2},
    "auto": {},
}


def key(i):
    return jax.random.key(i)


def normal(*shape, seed=0, scale=1.0):
    """Drawn by NumPy, because `jax.random` compiles a program for each shape."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def words(high, *shape, low=0):
    return jnp.asarray(np.random.default_rng(7).integers(low, high, shape), jnp.int32)


def oracle(loss, params, batch, bound, gamma=None):
    """The mean of clipped gradients, example by example, in float64 NumPy."""
    slow = jax.jit(jax.grad(loss))
    grads = [slow(params, jax.tree.map(operator.itemgetter(i), batch)) for i in range(B)]
    stacked = jax.tree.map(lambda *xs: np.stack([np.asarray(x, np.float64) for x in xs]), *grads)
    norms = np.sqrt(sum((x.reshape(B, -1) ** 2).sum(1) for x in jax.tree.leaves(stacked)))
    weights = np.minimum(1, bound / norms) if gamma is None else bound / (norms + gamma)
    return jax.tree.map(lambda x: np.tensordot(weights, x, 1) / B, stacked), norms


def plain():
    params = {"a": normal(8, 6), "b": jnp.ones(6), "c": normal(6, 6, seed=1), "unused": jnp.ones(3)}

    def loss(p, x):
        return jnp.sum(jnp.square(jnp.tanh(jnp.tanh(jnp.matmul(x, p["a"]) + p["b"]) @ p["c"].T)))

    return loss, params, normal(B, 8, seed=2), {"a", "c"}


def sequences():
    params = {"a": normal(8, 6), "b": normal(2, 3, 7, seed=1), "c": normal(2, 7, seed=3)}

    def loss(p, x):
        y = jnp.einsum("td,dp->pt", x, p["a"]).reshape(2, 3, -1)
        return jnp.sum(jnp.tanh(jnp.einsum("hpt,hpd->td", y, p["b"])) @ p["c"].T)

    return loss, params, normal(B, 3, 8, seed=2), {"a", "b"}  # c is smaller than its operand


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        ids, image = x
        h = linen.LayerNorm()(linen.Embed(30, 8)(ids))
        h = jnp.mean(linen.MultiHeadDotProductAttention(2)(h), axis=0)
        y = linen.relu(linen.Conv(4, (3, 3), strides=2)(image))
        y = linen.Conv(8, (3, 2), padding="VALID", kernel_dilation=(1, 2), use_bias=False)(y)
        return linen.Dense(3)(jnp.concatenate([h, y.ravel()]))


def in_linen():
    net = Net()
    batch = words(4, B, 3), normal(B, 8, 8, 3, seed=2)
    params = jax.jit(net.init)(key(0), jax.tree.map(lambda x: x[0], batch))
    found = ["Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel", "Embed_0/embedding"]
    found += [
        f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("key", "out", "query", "value")
    ]
    return (
        (lambda p, x: jnp.sum(jnp.square(net.apply(p, x)))),
        params,
        batch,
        {f"params/{path}" for path in found},
    )


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.table, self.out = nnx.Embed(20, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.norm(jnp.tanh(self.table(ids))))


def in_dicts():
    """The batch is nested dicts and tuples; the loss is a sum of two, which share parameters."""

    def loss(p, example):
        (x, label), weight = example["in"], example["weight"]["of regression"]
        h = jnp.tanh(x @ p["body"])
        one = optax.softmax_cross_entropy_with_integer_labels(h @ p["head"], label)
        return one + weight * jnp.sum(jnp.square(h @ p["other"]))

    params = {"body": normal(3, 4), "head": normal(4, 2), "other": normal(4, 3, seed=1)}
    batch = {"in": (normal(B, 3), words(2, B)), "weight": {"of regression": jnp.arange(1.0, B + 1)}}
    return loss, params, {**batch, "none": None}, set(params)


def in_nnx():
    graph, params = nnx.split(nnx.jit(lambda: Pair(nnx.Rngs(0)))())
    found = {"table/embedding", "out/kernel"}
    return (
        (lambda p, ids: jnp.sum(jnp.sin(nnx.merge(graph, p)(ids)))),
        params,
        words(6, B, 2),
        found,
    )


def in_equinox():
    linear = equinox.filter_jit(equinox.nn.Linear)
    net = equinox.nn.Sequential([linear(4, 6, key=key(0)), linear(6, 3, key=key(1))])
    params, static = equinox.partition(net, equinox.is_array)
    found = {"layers/0/weight", "layers/1/weight"}
    return (
        (lambda p, x: jnp.sum(jnp.exp(equinox.combine(p, static)(x)))),
        params,
        normal(B, 4, scale=0.1),
        found,
    )


def tied():
    def loss(p, ids):
        return -jnp.sum(jax.nn.log_softmax(p["table"][ids] @ p["inner"] @ p["table"].T)[:, 0])

    return loss, {"table": normal(12, 4), "inner": normal(4, 4)}, words(12, B, 1), {"inner"}


def scanned():
    def loss(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
        x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, p["again"])
        return jnp.sum(jnp.square(jax.jit(jnp.matmul)(x, p["last"])))

    params = {
        "layers": normal(3, 4, 4),
        "again": normal(4, 4, seed=1),
        "last": normal(4, 3, seed=2),
    }
    return loss, params, normal(B, 4), {"last"}


def tables():
    """Out-of-range ids in every mode; other axes; a single row; a sliced table."""

    def loss(p, ids):
        clipped, filled = (
            p["clip"].at[ids].get(mode="clip"),
            p["fill"].at[ids].get(mode="fill", fill_value=0),
        )
        columns, row = jnp.take(p["columns"], ids % 9, axis=1), p["row"][ids[0] % 9]
        cut = jnp.tanh(jnp.where(filled == 0, 0, filled) @ p["cut"][:3])
        return sum(jnp.sum(jnp.sin(x)) for x in (clipped, filled, columns, row, cut))

    params = {name: normal(20, 3, seed=i) for i, name in enumerate(("clip", "fill", "row", "cut"))}
    params = {**params, "columns": normal(2, 20), "cut": normal(5, 4)}
    return (
        loss,
        params,
        words(26, B, 4, low=-5),
        {"clip", "fill", "columns", "row"},
    )


def convolutions():
    """Padding, both dilations, another layout, groups; wide kernels and long ones."""
    layout = jax.lax.conv_dimension_numbers((1, 3, 6, 5), (4, 3, 2, 3), ("NCHW", "OIHW", "NCHW"))

    def loss(p, x):
        y = jax.lax.conv_general_dilated(
            x[None], p["a"], (2, 1), [(1, 2), (-1, 2)], (2, 1), (1, 2), dimension_numbers=layout
        )
        z = jax.lax.conv_general_dilated(
            jnp.tanh(y), p["groups"], (1, 1), "SAME", feature_group_count=2
        )
        return jnp.sum(jnp.sin(z)) + jnp.sum(jnp.tanh(jax.lax.conv(z, p["wide"], (1, 1), "VALID")))

    params = {
        "a": normal(4, 3, 2, 3),
        "groups": normal(6, 2, 2, 2, seed=1),
        "wide": normal(8, 6, 2, 2, seed=2, scale=0.1),
    }
    return loss, params, normal(B, 3, 6, 5), {"a", "wide"}


LOSSES = [
    plain,
    sequences,
    in_dicts,
    in_linen,
    in_nnx,
    in_equinox,
    tied,
    scanned,
    tables,
    convolutions,
]
# Microbatches rewrite only convolutions, so few losses are enough for them.
RUNS = [(plain, way) for way in WAYS] + [(make, "ghost") for make in LOSSES[1:]]
RUNS += [(make, "microbatch of 2") for make in (in_nnx, in_dicts, convolutions)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "way"), RUNS, ids=[f"{make.__name__} {way}" for make, way in RUNS]
)
def test_every_method_matches_clipping_one_example_at_a_time(make, way):
    loss, params, batch, _ = make()
    bound = float(np.median(oracle(loss, params, batch, 1.0)[1])) * 1.0001
    want, norms = oracle(loss, params, batch, bound)
    step = jax.jit(oc.clipped_value_and_grad(loss, bound, **WAYS[way]))
    (value, examples), grads = step(params, batch)
    np.testing.assert_allclose(examples.norms, norms, rtol=2e-6)
    np.testing.assert_allclose(value, np.mean(examples.losses), rtol=1e-6)
    assert (examples.clipped, examples.nonfinite) == (B // 2, 0)
    assert examples.aux is None
    for x, y, p in zip(*map(jax.tree.leaves, (grads, want, params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6 * (np.abs(y).max() + bound / B))
        assert (x.dtype, x.shape) == (p.dtype, p.shape)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("make", LOSSES)
def test_which_parameters_are_ghosts(make):
    loss, params, batch, found = make()
    assert set(per_example.ghost_parameters(loss, params, batch)) == found


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_normalized_instead_of_clipped(way):
    loss, params, batch, _ = plain()
    want, _ = oracle(loss, params, batch, 0.5, gamma=0.01)
    _, grads = jax.jit(oc.clipped_value_and_grad(loss, 0.5, action=per_example.auto_s(), **way))(
        params, batch
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), grads, want)


@pytest.mark.parametrize("way", ["ghost", "ghost, 2 at a time", "microbatch"])
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_an_example_that_is_not_finite_weighs_nothing_and_is_counted(way, poison):
    loss, params, batch, _ = plain()
    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, reduce="sum", **WAYS[way]))
    (value, examples), grads = step(params, batch.at[1, 0].set(poison))
    (want_value, want_examples), want = step(params, jnp.delete(batch, 1, axis=0))
    assert (examples.nonfinite, examples.clipped) == (1, want_examples.clipped)
    assert not np.isfinite(examples.norms[1]) or not np.isfinite(examples.losses[1])
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), grads, want)


def grouped(kernel, x, **how):
    how = {"padding": "SAME", "feature_group_count": 2, **how}
    return jax.lax.conv_general_dilated(x, kernel, (1,) * (x.ndim - 2), **how)


def grouped_inside(kernel, x):
    """In functions that JAX keeps as one operation each."""
    y = jax.lax.cond(x.sum() > 0, grouped, lambda w, x: grouped(w, 2 * x), kernel, x)
    y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(grouped(kernel, y)), None), y, length=2)
    return jax.checkpoint(lambda w, y: jnp.tanh(grouped(w, y)))(kernel, y)


# A layer, its weights, and the shape of one example.
LAYERS = {
    "dense": (lambda w, x: x @ w, (3, 4), (2, 3)),
    "batched dense": (lambda w, x: jnp.einsum("hti,hij->htj", x, w), (2, 3, 4), (2, 2, 3)),
    "convolution": (functools.partial(grouped, feature_group_count=1), (4, 3, 3), (1, 3, 5)),
    "transposed": (
        lambda w, x: jax.lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 2, 4),
        (1, 5, 2),
    ),
    "grouped": (grouped, (4, 2, 3, 3), (1, 4, 5, 5)),
    "grouped, channels last": (
        functools.partial(grouped, dimension_numbers=("NWC", "WIO", "NWC")),
        (3, 2, 6),
        (2, 5, 4),
    ),
    "depthwise": (functools.partial(grouped, feature_group_count=4), (8, 1, 3), (1, 4, 5)),
    "groups of the batch": (
        functools.partial(grouped, feature_group_count=1, batch_group_count=2),
        (4, 3, 3),
        (4, 3, 5),
    ),
    "grouped inside others": (grouped_inside, (4, 2, 3), (1, 4, 5)),
    "grouped, kernels of examples": (
        lambda w, x: grouped(jnp.einsum("ab,bcd->acd", w, x), x.reshape(1, 4, 6)),
        (4, 4),
        (4, 2, 3),
    ),
    "cumulative": (lambda w, x: jnp.cumsum(x * w) + jnp.cumprod(x * w), (5,), (5,)),
    "sorted": (lambda w, x: jnp.sort(x * w) * jnp.arange(5.0), (5,), (5,)),
    "frequencies": (lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(w)), (6,), (6,)),
    "attention": (lambda w, x: jax.nn.softmax(x @ w @ x.T) @ x, (3, 3), (4, 3)),
    "recurrent": (
        lambda w, x: jax.lax.scan(lambda h, x: (x + h @ w, None), jnp.ones(3), x)[0],
        (3, 3),
        (4, 3),
    ),
}


def assert_examples_are_apart(layer, method):
    """Examples that are not finite leave the others as they are."""
    apply, weights, example = LAYERS[layer]

    def loss(w, x):
        return jnp.sum(jnp.sin(apply(w, x)))

    def run(w, good, bad, mask):
        step = oc.clipped_value_and_grad(loss, 1.0, reduce="sum", method=method)
        alone = jax.lax.map(functools.partial(jax.grad(loss), w), good)
        return step(w, good, weights=mask), step(w, bad), alone

    good, mask = normal(B, *example), np.array([1, 0, 1, 0, 1], bool)
    bad = good.at[(1, *[0] * len(example))].set(jnp.nan).at[(3, *[-1] * len(example))].set(jnp.inf)
    want, got, alone = jax.jit(run)(normal(*weights, seed=1), good, bad, mask)
    assert got[0][1].nonfinite == 2 and got[0][1].clipped > 0
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[0][1].norms[mask], want[0][1].norms[mask], rtol=1e-6)
    lengths = jnp.linalg.norm(alone.reshape(B, -1), axis=1)
    np.testing.assert_allclose(want[0][1].norms, lengths, rtol=1e-5)


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_examples_that_are_not_finite_leave_the_others_as_they_are(layer, method):
    """Whatever JAX and XLA make of the layer for many examples."""
    assert_examples_are_apart(layer, method)


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
@pytest.mark.parametrize("layer", ["convolution", "grouped", "grouped inside others"])
def test_the_form_for_a_tpu_leaves_the_others_as_they_are(layer, method, monkeypatch):
    """It runs on a CPU here, with convolutions that multiply other examples by 0, as on a TPU."""

    def spoil(function):
        return lambda *operands: function(*operands) + 0 * sum(map(jnp.sum, operands))

    def form_of(*operands, default, tpu=None, **forms):
        return (tpu or default)(*operands)

    keep_apart = xla.keep_apart
    spoiled = lambda function, *operands: keep_apart(spoil(function), *operands)  # noqa: E731
    monkeypatch.setattr(per_example.convolutions, "keep_apart", spoiled)
    monkeypatch.setattr(jax.lax, "platform_dependent", form_of)
    assert_examples_are_apart(layer, method)
    jax.clear_caches()


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_a_step_with_convolutions_can_be_differentiated(method):
    """One of them is of parameters alone, and has no examples to keep apart."""

    def loss(w, x):
        kernel = grouped(jnp.ones((3, 3, 1)), w, feature_group_count=1)
        return jnp.sum(jnp.sin(grouped(kernel, x)))

    def by_hand(w, x):
        grads = jax.vmap(jax.grad(loss), (None, 0))(w, x)
        lengths = jnp.sqrt(jnp.sum(jnp.square(grads), axis=(1, 2, 3), keepdims=True))
        return jnp.sum(grads * jnp.minimum(1, 1 / lengths), axis=0)

    step = oc.clipped_value_and_grad(loss, 1.0, reduce="sum", method=method)
    w, x = normal(4, 3, 3), normal(B, 1, 6, 5, seed=1)
    got, want = (
        jax.jit(jax.grad(lambda w, total=total: jnp.sum(jnp.cos(total(w, x)))))(w)
        for total in (lambda w, x: step(w, x)[1], by_hand)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_measured_in_float32(dtype, method):
    """The norm is that of the half-precision gradients, up to their rounding."""
    loss, params, batch, _ = plain()
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (params, batch))
    want, norms = oracle(loss, params, batch, 0.5)
    (_, examples), grads = jax.jit(oc.clipped_value_and_grad(loss, 0.5, method=method))(
        params, batch
    )
    eps = float(jnp.finfo(dtype).eps)
    assert examples.norms.dtype == jnp.float32
    np.testing.assert_allclose(examples.norms, norms, rtol=2 * eps)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=8 * eps, atol=eps * 0.5)


@pytest.mark.parametrize("size", [1e-30, 1e25])
@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_gradients_of_any_size(size, method):
    loss, params, batch, _ = sequences()
    step = jax.jit(
        oc.clipped_value_and_grad(lambda p, x, size: size * loss(p, x), 1.0, method=method)
    )
    norms = step(params, batch, 1.0)[0][1].norms
    (_, examples), grads = step(params, batch, size)
    np.testing.assert_allclose(examples.norms, norms * size, rtol=1e-5)
    length = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(grads)))
    assert examples.nonfinite == 0 and length <= 1.00001 and (size < 1 or length > 0.01)


@pytest.mark.parametrize("make", [in_dicts, tables, convolutions])
def test_the_form_for_a_gpu_gives_the_same_numbers(make, monkeypatch):
    """It runs on a CPU here. Examples of all sizes, with NaN in each factor, one of weight 0."""
    loss, params, batch, _ = make()
    spoil = lambda x: x if x.dtype == jnp.int32 else x.at[4].multiply(jnp.nan)  # noqa: E731
    batch = jax.tree.map(spoil, batch), jnp.array([1.0, 1e-30, 1e25, jnp.nan, 0.5])

    def sized(p, example):
        x, size = example
        # If the size is NaN, so is the gradient, and the loss is finite.
        return jnp.where(jnp.isnan(size), 0.0, size * loss(p, x))

    def run(params, batch):
        step = oc.clipped_value_and_grad(sized, 0.5, method="ghost")
        (_, examples), grads = step(params, batch, weights=jnp.array([1.0, 2.0, 1.0, 1.0, 0.0]))
        return grads, examples.norms, examples.nonfinite

    want, chosen = jax.jit(run)(params, batch), []

    def form_of(*operands, default, cuda=None, **forms):
        chosen.append(cuda)
        return (cuda or default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", form_of)
    got = jax.jit(functools.partial(run))(params, batch)
    jax.clear_caches()  # its traces have the forms for a GPU
    assert any(chosen) and got[2] == 1 and optax.tree.norm(got[0]) > 0.01
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["ghost", "microbatch of 2"])
def test_keys_shared_arguments_and_auxiliary_outputs(way):
    def loss(w, example, scale):
        x, k = example
        mask = jax.random.bernoulli(k, 0.5, x.shape)
        return scale * jnp.sum(jnp.tanh(jnp.where(mask, x, 0) @ w)), {"mask": mask}

    w, batch = normal(4, 3), (normal(B, 4), jax.random.split(key(3), B))
    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, has_aux=True, **WAYS[way]))
    (_, examples), grads = step(w, batch, 2.0)
    want, _ = oracle(lambda w, example: loss(w, example, 2.0)[0], w, batch, 1.0)
    masks = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (4,)))(batch[1])
    np.testing.assert_array_equal(examples.aux["mask"], masks)
    np.testing.assert_allclose(grads, want, rtol=1e-5, atol=1e-6)


def test_the_bound_may_change_without_a_new_trace():
    loss, params, batch, _ = plain()
    traces = []

    @jax.jit
    def step(params, batch, bound):
        traces.append(1)
        return oc.clipped_value_and_grad(loss, bound, method="ghost")(params, batch)[1]

    lengths = [
        float(optax.tree.norm(step(params, batch, jnp.float32(bound))))
        for bound in (0.0, 0.1, 0.2, -1.0)
    ]
    assert lengths[0] == lengths[3] == 0 and 0 < lengths[1] < lengths[2] <= 0.2 and len(traces) == 1


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_without_jit(method):
    def loss(p, x):
        return jnp.sum(jnp.square(jnp.matmul(x, p["w"]) + p["b"]))

    params = {"w": normal(3, 2), "b": jnp.ones(2)}
    step = oc.clipped_value_and_grad(
        loss, np.float32(1), action=per_example.auto_s(0.1), method=method
    )
    (_, examples), grads = step(params, normal(B, 3))
    assert examples.clipped == B
    assert 0.1 < optax.tree.norm(grads) <= 1


def memory(way, batch, width=24):
    params = [jnp.zeros((width, width)) for _ in range(3)]

    def loss(params, x):
        return jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x))

    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, **way))
    compiled = step.lower(params, jnp.zeros((batch, width))).compile(AS_USERS)
    return compiled.memory_analysis().temp_size_in_bytes, 4 * 3 * width**2


def test_memory_is_bounded_by_the_microbatch_and_ghosts_are_not_there():
    few, grads = memory({"method": "microbatch", "microbatch_size": 4}, 16)
    many, _ = memory({"method": "microbatch", "microbatch_size": 4}, 128)
    assert many < 1.5 * few + 128 * 24 * 4 and many < 128 * grads / 8
    ghost, _ = memory({"method": "ghost"}, 128)
    assert ghost < 128 * grads / 10


@pytest.mark.parametrize("way", ["ghost", "microbatch of 2"])
def test_a_batch_over_devices_stays_there(way):
    loss, params, _, _ = sequences()
    batch, mesh = normal(2 * B, 3, 8), jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, **WAYS[way]))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    compiled = step.lower(whole, spread).compile(AS_USERS).as_text()
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled
    assert "all-to-all" not in compiled
    assert_close(jax.device_get(step(params, spread)[1]), step(params, batch)[1])


def assert_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)


# Only ghost clipping analyzes the loss.
@pytest.mark.parametrize(
    ("make", "way"),
    [(make, "ghost") for make in (plain, sequences, in_equinox, scanned)]
    + [(plain, "ghost, 2 at a time"), (scanned, "microbatch of 2")],
)
def test_a_mesh_of_explicit_axes(make, way):
    """With explicit axes the types say how arrays are sharded."""
    loss, params, batch, _ = make()
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch)
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, **WAYS[way]))
    want = step(params, batch)[1]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, PartitionSpec())
        (_, examples), grads = step(whole, jax.device_put(batch, PartitionSpec("data")))
        assert jax.typeof(examples.norms).sharding.spec == PartitionSpec("data")
    assert_close(jax.device_get(grads), want)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")], ids=["whole", "spread"])
@pytest.mark.parametrize("way", ["ghost", "microbatch of 2"])
def test_weights_on_a_mesh_of_explicit_axes(way, spec):
    loss, params, batch, _ = plain()
    batch, weights = batch[:4], jnp.array([1.0, 0.0, 2.0, 1.0])
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, **WAYS[way]))
    want = step(params, batch, weights=weights)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        spread = jax.device_put(batch, PartitionSpec("data"))
        whole = jax.device_put(params, PartitionSpec())
        got = step(whole, spread, weights=jax.device_put(weights, spec))
    assert_close(jax.device_get(got), want)


@pytest.mark.parametrize("clip", ["per_example_global_norm_clip", "per_example_layer_norm_clip"])
def test_gradients_on_a_mesh_of_explicit_axes(clip):
    grads = {"a": normal(4, 3), "b": normal(4, 2, 2, seed=1)}
    clip = jax.jit(getattr(per_example, clip))
    want = clip(grads, 1.0)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))):
        got = clip(jax.device_put(grads, PartitionSpec("data")), 1.0)
    assert_close(jax.device_get(got), want)


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("way", ["ghost", "ghost, 2 at a time", "microbatch of 2"])
def test_in_shard_map_each_device_clips_its_own_examples(way, typed):
    """JAX sums gradients of replicated parameters over devices, but not before they are clipped."""
    loss, params, batch, _ = plain()
    batch = jnp.concatenate([batch, batch[:1]])
    step = oc.clipped_value_and_grad(loss, 0.5, reduce="sum", **WAYS[way])

    def local(params, batch):
        (_, examples), grads = step(params, batch)
        return jax.lax.psum(grads, "data"), examples.norms

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, data), out_specs=(whole, data), check_vma=typed
    )
    (_, examples), grads = jax.jit(step)(params, batch)
    assert_close(jax.jit(spread)(params, batch), (grads, examples.norms))


MASKS = {
    "booleans": np.array([True, False, True, True, False]),
    "ones and zeros": jnp.array([1, 0, 1, 1, 0]),
    "negative and NaN": jnp.array([1.0, -1.0, 1.0, 1.0, jnp.nan]),
}


# The test for valid weights is the same for all methods, and "auto" picks one of them.
@pytest.mark.parametrize(
    ("way", "reduce", "mask"),
    [(way, "mean", "negative and NaN") for way in WAYS if way != "auto"]
    + [("ghost", "sum", "booleans"), ("microbatch of 2", "sum", "ones and zeros")],
)
def test_an_example_of_weight_zero_is_ignored(way, reduce, mask):
    loss, params, batch, _ = plain()
    step = oc.clipped_value_and_grad(loss, 0.5, reduce=reduce, **WAYS[way])
    padded = batch.at[1].set(jnp.nan).at[4].set(99.0)
    (value, examples), grads = jax.jit(step)(params, padded, weights=MASKS[mask])
    (want, others), want_grads = jax.jit(step)(params, batch[np.array([0, 2, 3])])
    assert_close(grads, want_grads)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert (examples.clipped, examples.nonfinite) == (others.clipped, 0)
    np.testing.assert_allclose(examples.norms[np.array([0, 2, 3])], others.norms, rtol=1e-6)


@pytest.mark.parametrize("way", ["ghost, 2 at a time", "microbatch"])
def test_an_example_of_weight_two_counts_twice(way):
    loss, params, batch, _ = plain()
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, **WAYS[way]))
    (value, _), grads = step(params, batch[:3], weights=jnp.array([2.0, 1.0, 2.0]))
    (want, _), want_grads = step(params, batch[np.array([0, 0, 1, 2, 2])])
    assert_close(grads, want_grads)
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_padding_only_makes_no_step(way):
    loss, params, batch, _ = plain()
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, **WAYS[way]))
    (value, examples), grads = step(params, batch, weights=jnp.zeros(B))
    assert (value, examples.clipped, examples.nonfinite) == (0, 0, 0)
    assert optax.tree.norm(grads) == 0


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_a_loss_may_want_a_batch_of_one(method):
    net = linen.Dense(3)
    batch = {"x": normal(B, 4), "y": words(3, B)}
    params = jax.jit(net.init)(key(0), batch["x"])

    def mean_loss(params, batch):
        logits = net.apply(params, batch["x"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))

    step = oc.clipped_value_and_grad(mean_loss, 0.5, method=method, keep_batch_dim=True)
    (value, _), grads = jax.jit(step)(params, batch)
    one_by_one = lambda p, x: mean_loss(p, jax.tree.map(lambda x: x[None], x))  # noqa: E731
    assert_close(grads, oracle(one_by_one, params, batch, 0.5)[0])
    np.testing.assert_allclose(value, mean_loss(params, batch), rtol=1e-6)
    found = per_example.ghost_parameters(mean_loss, params, batch, keep_batch_dim=True)
    assert found == ("params/kernel",)


WITHOUT_GRADIENTS = {
    "unused": (lambda p, x: jnp.sum(x), {"w": jnp.ones(3)}),
    "constant": (lambda p, x: 1.0, {"w": jnp.ones(3)}),
    "no parameters": (lambda p, x: jnp.sum(x), {}),
    "None": (lambda p, x: jnp.sum(x), None),
    "no elements": (lambda p, x: jnp.sum(p["w"]), {"w": jnp.ones((0, 3))}),
}


@pytest.mark.parametrize(("loss", "params"), WITHOUT_GRADIENTS.values(), ids=WITHOUT_GRADIENTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_without_gradients_has_zeros(way, loss, params):
    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, **WAYS[way]))
    (_, examples), grads = step(params, normal(B, 3))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert_close(grads, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(examples.norms, np.zeros(B))
    assert (examples.clipped, examples.nonfinite) == (0, 0)


@pytest.mark.parametrize("bound", [0.1, 100.0])
@pytest.mark.parametrize("way", WAYS)
def test_of_one_example_it_is_the_global_clip(way, bound):
    loss, params, batch, _ = plain()
    clip = oc.clip_by_global_norm(bound)

    @jax.jit
    def run(params, batch):
        _, got = oc.clipped_value_and_grad(loss, bound, **WAYS[way])(params, batch)
        grads = jax.grad(loss)(params, batch[0])
        formed = jax.tree.map(lambda g: g[None], grads)
        summed = per_example.per_example_global_norm_clip(formed, bound)
        return got, summed, clip.update(grads, clip.init(params))

    got, (sums, clipped), (want, state) = run(params, batch[:1])
    assert_close(got, want)
    assert_close(sums, want)
    assert float(clipped) == float(state.metrics.clipped_share)


@pytest.mark.parametrize("size", [1e-33, 1e-27, 1e-19, 1.0, 1e19, 1e30, 1e34])
def test_formed_gradients_of_any_size(size):
    """Each example has its own magnitude; one is zero."""
    grads = {"a": normal(4, 300), "b": normal(4, 7, 5, seed=1), "c": jnp.zeros((4, 3))}
    scale = jnp.array([1.0, size, 0.0, 1e-3])
    scaled = jax.tree.map(lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), grads)
    sums = jax.jit(per_example.per_example_normalize)(scaled, 0.0)
    lengths = jnp.sqrt(sum(jnp.sum(g**2, axis=range(1, g.ndim)) for g in grads.values()))
    lengths = jnp.where(scale == 0, jnp.inf, lengths)
    want = jax.tree.map(lambda g: jnp.tensordot(1 / lengths, g, 1), grads)
    assert_close(sums, want)


def test_no_example_at_all_sums_to_zeros():
    grads = {"a": jnp.ones((0, 3))}
    assert_close(per_example.per_example_global_norm_clip(grads, 1.0), ({"a": jnp.zeros(3)}, 0))
    assert_close(
        per_example.per_example_layer_norm_clip(grads, 1.0), ({"a": jnp.zeros(3)}, {"a": 0})
    )
    assert_close(per_example.per_example_normalize(grads), {"a": jnp.zeros(3)})


class WithBatchNorm(linen.Module):
    axis_name: str | None = None

    @linen.compact
    def __call__(self, x, train=True):
        norm = linen.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
        return jnp.sum(linen.Dense(2)(norm(linen.Dense(4)(x))))


@functools.cache
def batch_norm_variables():
    return jax.jit(WithBatchNorm().init)(key(0), normal(1, 3))


def in_linen_with_batch_norm(returned, axis_name=None, mutable=("batch_stats",)):
    net, variables = WithBatchNorm(axis_name), batch_norm_variables()

    def loss(params, x):
        variables_now = {**variables, "params": params}
        if not mutable:
            return net.apply(variables_now, x), {}
        value, state = net.apply(variables_now, x, mutable=mutable)
        return value, returned(state)

    return loss, variables["params"]


class NnxWithBatchNorm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return jnp.sum(self.norm(x))


def in_nnx_with_batch_norm(wrt):
    graph, params, rest = nnx.split(NnxWithBatchNorm(nnx.Rngs(0)), wrt, ...)

    def loss(params, x):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model, nnx.BatchStat)

    return loss, params


def in_equinox_with_batch_norm():
    norm, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(
        3, axis_name="batch", mode="batch"
    )
    params, static = equinox.partition(norm, equinox.is_inexact_array)

    def loss(params, x):
        value, new = equinox.combine(params, static)(x[0], state)
        return jnp.sum(value), new

    return loss, params


BATCH_NORMS = {
    "linen, all state": lambda: in_linen_with_batch_norm(lambda state: state),
    "linen, statistics": lambda: in_linen_with_batch_norm(lambda state: state["batch_stats"]),
    "linen, pooled": lambda: in_linen_with_batch_norm(lambda state: {}, axis_name="batch"),
    "linen, immutable": lambda: in_linen_with_batch_norm(None, mutable=()),
    "nnx": lambda: in_nnx_with_batch_norm(nnx.Param),
    "nnx, statistics trained": lambda: in_nnx_with_batch_norm(nnx.Variable),
    "equinox": in_equinox_with_batch_norm,
}


@pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS)
@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_batch_norm_is_rejected(method, make):
    loss, params = make()
    step = oc.clipped_value_and_grad(loss, 1.0, has_aux=True, keep_batch_dim=True, method=method)
    with pytest.raises(ValueError, match=r"clipped_value_and_grad: .*Use GroupNorm"):
        step(params, normal(B, 3))


def test_an_error_of_the_loss_is_quoted():
    def loss(params, example):
        raise NameError("unbound axis name: batch\nand more")

    with pytest.raises(ValueError, match=r"the loss failed: unbound axis name: batch \S"):
        oc.clipped_value_and_grad(loss, 1.0)(jnp.ones(1), jnp.ones((2, 1)))


def test_batch_norm_with_fixed_statistics_is_fine():
    net, variables = WithBatchNorm(), batch_norm_variables()

    def loss(params, x, stats):
        return net.apply({"params": params, "batch_stats": stats}, x, train=False)

    step = jax.jit(oc.clipped_value_and_grad(loss, 1.0, keep_batch_dim=True))
    (_, examples), _ = step(variables["params"], normal(B, 3), variables["batch_stats"])
    assert examples.clipped > 0


REFUSED = {
    "method": ({"method": "fast"}, {}, "method must be one of 'auto', 'ghost', 'microbatch'"),
    "reduce": ({"reduce": "none"}, {}, "reduce must be one of 'mean', 'sum'"),
    "bound": ({"max_norm": -1.0}, {}, "max_norm must be a number from 0"),
    "bounds": ({"max_norm": jnp.ones(2)}, {}, "max_norm must be one number"),
    "action": ({"action": per_example.auto_s}, {}, "action must be .* write auto_s"),
    "microbatch": ({"microbatch_size": 0}, {}, "microbatch_size must be a whole number"),
    "sizes": (
        {},
        {"batch": {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}},
        "same examples.*'y': \\(3,\\)",
    ),
    "no axis": ({}, {"batch": 1.0}, "leading axis"),
    "no example": ({}, {"batch": jnp.ones((0, 3))}, "at least one example"),
    "no leaves": ({}, {"batch": {}}, "leading axis"),
    "flag": ({"keep_batch_dim": 1}, {}, "keep_batch_dim must be True or False"),
    "few weights": ({}, {"weights": jnp.ones(1)}, "weights must be 2 real numbers.*\\(1,\\)"),
    "weights in words": ({}, {"weights": ["a", "b"]}, "weights must be 2 real numbers"),
    "complex weights": ({}, {"weights": jnp.ones(2, complex)}, "weights must be 2 real numbers"),
    "whole numbers": (
        {},
        {"params": {"w": jnp.ones(3), "n": 1}},
        "floating-point numbers, but these leaves do not: n",
    ),
    "a string": ({}, {"batch": {"x": jnp.ones((2, 3)), "y": "train"}}, "batch .*leaf 'y' is of"),
    "strings": ({}, {"batch": np.array(["a", "b"])}, "batch .*is of type <U1"),
    "a string for all": ({}, {"shared": ["train"]}, "shared .*functools.partial"),
    "functions": ({}, {"params": {"w": jnp.ones(3), "act": jnp.tanh}}, "params .*leaf 'act'"),
    "vector": ({"loss": lambda p, x: x}, {}, "one real number for one example.*\\(3,\\)"),
    "pair": ({"loss": lambda p, x: (jnp.sum(x), x)}, {}, "pass has_aux=True"),
    "losses": ({"loss": lambda p, x: {"a": jnp.sum(x)}}, {}, "add the losses up.*has_aux=True"),
    "aux in words": (
        {"has_aux": True, "loss": lambda p, x: (jnp.sum(p["w"] * x), "fine")},
        {},
        "aux must hold arrays.*'str'",
    ),
    "no pair": ({"has_aux": True}, {}, "must return a pair"),
}


@pytest.mark.parametrize(("make", "call", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", ["auto", "ghost", "microbatch"])
def test_bad_arguments_are_rejected(method, make, call, message):
    make = {"loss": lambda p, x: jnp.sum(p["w"] * x), "max_norm": 1.0, "method": method, **make}
    call = {"params": {"w": jnp.ones(3)}, "batch": jnp.ones((2, 3)), **call}
    with pytest.raises(ValueError, match=f"clipped_value_and_grad: .*{message}"):
        oc.clipped_value_and_grad(**make)(
            call.pop("params"), call.pop("batch"), *call.pop("shared", ()), **call
        )


AUTO = {"ghost": plain, "microbatch": tied}


@pytest.mark.parametrize("method", AUTO)
def test_auto_counts_parameters(method):
    """A table that is used twice is no ghost. It outweighs the layer between: microbatch wins."""
    loss, params, batch, _ = AUTO[method]()
    auto, ghost, microbatch = (
        jax.jit(oc.clipped_value_and_grad(loss, 1.0, method=m)).lower(params, batch).as_text()
        for m in ("auto", "ghost", "microbatch")
    )
    assert ghost != microbatch and auto == {"ghost": ghost, "microbatch": microbatch}[method]


def look_up(width, **where):
    def rows(table, ids):
        return table.at[ids].get(**where)

    return rows, normal(30, width), jnp.array([[1, 1, 30, 40], [2, 30, 0, 0]])


def convolve(image, kernel):
    how = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return jax.lax.conv_general_dilated(image[None], kernel, (2, 1), **how)


@pytest.mark.parametrize(
    ("layer", "weights", "batch"),
    [
        look_up(4, mode="clip"),
        look_up(1, mode="fill", fill_value=0),
        (lambda table, at: table[at[0], at[1]], normal(9, 8, 2), jnp.array([[[1, 2], [3, 0]]] * 2)),
        (lambda table, at: table[at], normal(30, 4), jnp.array([[1], [2]])),
        (lambda kernel, x: convolve(x, kernel), normal(3, 2, 2, 5), normal(3, 5, 4, 2, seed=1)),
    ],
    ids=["ids that the table has not, clipped", "filled", "pairs of ids", "one id", "convolution"],
)
def test_a_ghost_norm_matches_the_norm_of_the_gradient(layer, weights, batch):
    def loss(weights, example):
        out = layer(weights, example)
        return jnp.sum(jnp.sin(out) * jnp.arange(1.0, out.size + 1).reshape(out.shape))

    ghost, microbatch = (
        jax.jit(oc.clipped_value_and_grad(loss, 0.1, method=method))(weights, batch)[1]
        for method in ("ghost", "microbatch")
    )
    np.testing.assert_allclose(ghost, microbatch, rtol=1e-4, atol=1e-7)


def test_a_negative_bound_of_examples_counts_as_zero():
    lengths = jnp.array([0.5, 2.0])
    assert not weigh(oc.actions.rescale, lengths, -1.0).any()
    assert not weigh(oc.per_example.auto_s(0.1), lengths, -1.0).any()
    # One on a device is not waited for, so nothing can be refused.
    for clip in (oc.per_example_global_norm_clip, oc.per_example_layer_norm_clip):
        sums, _ = clip([jnp.ones((2, 3))], jnp.array(-1.0))
        assert not sums[0].any()


@pytest.mark.parametrize(("reduce", "value"), [("mean", 4.0), ("sum", 8.0)])
def test_the_loss_of_a_user_is_that_of_the_examples_that_are_there(reduce, value):
    loss = per_example.user_loss(lambda w, x: w * x, reduce=reduce)
    assert loss(1.0, (jnp.array([3.0, 5.0, 9.0]), jnp.array([True, True, False]))) == value


def test_an_example_of_zeros_weighs_nothing_without_gamma():
    np.testing.assert_array_equal(
        per_example.per_example_normalize(jnp.array([[0.0, 0.0], [3.0, 4.0]]), gamma=0.0),
        np.float32([0.6, 0.8]),
    )


def test_bad_numbers_are_rejected_by_name():
    with pytest.raises(ValueError, match=r"^per_example_normalize: gamma must"):
        per_example.per_example_normalize(jnp.ones((1, 1)), gamma=-1.0)
    with pytest.raises(ValueError, match=r"^per_example_layer_norm_clip: global_l2_norm_clip must"):
        per_example.per_example_layer_norm_clip(jnp.ones((1, 1)), -1.0)


def test_bounds_of_layers_by_their_sizes():
    grads = {"one": 9 * jnp.ones((2, 1)), "three": 9 * jnp.ones((2, 3))}
    sums, _ = per_example.per_example_layer_norm_clip(grads, 2.0, uniform=False)
    np.testing.assert_allclose(
        np.concatenate([sums["one"], sums["three"]]), 2 * np.ones(4), rtol=1e-6
    )


def test_gradients_that_are_integers_are_summed_as_floats():
    (total,), count = oc.per_example_global_norm_clip([jnp.array([[1], [2]])], 1.0)
    assert total.dtype == jnp.float32 and total[0] == 2 and count == 1


def test_the_benchmark_runs(capsys):
    benchmark.main(["--small", "--models", "mlp"])
    assert capsys.readouterr().out.count("| mlp |") == 6
