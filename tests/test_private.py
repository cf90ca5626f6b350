"""What private training needs beyond one clip: other actions, bounds by layer, users, a bound that
is learned privately, and error feedback. Each against the paper in NumPy, and by its promise: how
far one example can move the result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip import actions, per_example, scopes

B = 8


def params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "in": {"w": jax.random.normal(keys[0], (6, 4))},
        "out": jax.random.normal(keys[1], (4,)),
    }


def batch(seed=1):
    """Examples of very different size."""
    x, size = jax.random.normal(jax.random.key(seed), (B, 6)), jnp.logspace(-2, 1, B)
    return x * size[:, None]


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["in"]["w"]) * p["out"]) ** 2


def gradients(p, examples):
    """The gradient of each example, (B, 24) and (B, 4) in float64."""
    grads = jax.vmap(jax.grad(loss), (None, 0))(p, examples)
    return [np.asarray(g, np.float64).reshape(len(examples), -1) for g in jax.tree.leaves(grads)]


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def summed(examples, *args, weights=None, **options):
    step = oc.clipped_value_and_grad(loss, *args, reduce="sum", **options)
    (_, seen), total = jax.jit(step)(params(), examples, weights=weights)
    return seen, total


# The factor of an example of norm n at the bound b, by the papers.
FACTORS = {
    "clip": (None, lambda n, b: min(1, b / n)),
    "normalize": (actions.normalize, lambda n, b: b / n),
    "AUTO-S": (per_example.auto_s(), lambda n, b: b / (n + 0.01)),
    "AUTO-V": (per_example.auto_s(0.0), lambda n, b: b / n),
    "PSAC": (per_example.psac(0.3), lambda n, b: b / (n + 0.3 / (n + 0.3))),
    "drop": (actions.zero, lambda n, b: float(n <= b)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_an_action_is_as_its_paper_says_and_keeps_the_bound(name):
    action, factor = FACTORS[name]
    grads, bound = np.concatenate(gradients(params(), batch()), axis=1), 0.7
    norms = np.linalg.norm(grads, axis=1)
    assert norms.min() < 0.1 * bound and norms.max() > 2 * bound
    each = grads * np.array([factor(n, bound) for n in norms])[:, None]
    _, total = summed(batch(), bound, action=action, method="ghost")
    np.testing.assert_allclose(flat(total), each.sum(0), rtol=1e-4, atol=1e-5)
    formed, _ = per_example.per_example_global_norm_clip(jnp.float32(grads), bound, action)
    np.testing.assert_allclose(formed, each.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FACTORS)
def test_no_action_makes_an_example_longer_than_its_bound(name):
    norms = jnp.concatenate([jnp.logspace(-30, 30, 200), jnp.zeros(1)])
    factors = (FACTORS[name][0] or actions.rescale)(norms, jnp.full_like(norms, 0.7))
    assert jnp.all(norms * factors <= 0.7 * (1 + 1e-6)) and jnp.all(jnp.isfinite(factors))


@pytest.mark.parametrize("make", [per_example.auto_s, per_example.psac])
def test_without_a_bound_nothing_changes_and_derivatives_are_finite(make):
    norms = jnp.array([0.0, 1e-20, 2.0])
    np.testing.assert_array_equal(make()(norms, jnp.full(3, jnp.inf)), 1)
    for bound in (1.0, jnp.inf):
        slope = jax.grad(lambda n, b=bound: jnp.sum(n * make()(n, jnp.full(3, b))))(norms)
        assert jnp.all(jnp.isfinite(slope))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="auto_s: gamma must be a number from 0"):
        per_example.auto_s(-1.0)
    with pytest.raises(ValueError, match="psac: r must be a number larger than 0"):
        per_example.psac(0.0)


BLOCKS = {
    "leaf": (scopes.leaf, {"in/w": 0.3, "out": 0.8}),
    "groups": (scopes.groups({"in": "first", "out": "rest"}), {"first": 0.3, "rest": 0.8}),
}


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
@pytest.mark.parametrize("name", BLOCKS)
def test_bounds_by_block_are_as_each_block_by_itself(name, method):
    scope, bounds = BLOCKS[name]
    seen, total = summed(batch(), bounds, scope=scope, method=method, microbatch_size=3)
    norms = [np.linalg.norm(g, axis=1) for g in gradients(params(), batch())]
    want = [
        np.minimum(1, b / n) @ g
        for b, n, g in zip((0.3, 0.8), norms, gradients(params(), batch()), strict=True)
    ]
    np.testing.assert_allclose(seen.norms, np.stack(norms, axis=1), rtol=1e-5)
    np.testing.assert_allclose(flat(total), np.concatenate(want), rtol=1e-5, atol=1e-6)
    assert seen.clipped == np.sum((norms[0] > 0.3) | (norms[1] > 0.8))
    as_array = summed(batch(), jnp.array([0.3, 0.8]), scope=scope, method=method)[1]
    np.testing.assert_allclose(flat(as_array), flat(total), rtol=1e-5, atol=1e-6)


def test_an_example_that_is_not_finite_in_one_block_is_left_out_of_all():
    bad = batch().at[2].set(jnp.nan)
    seen, total = summed(bad, 0.5, scope=scopes.leaf)
    want = summed(jnp.delete(bad, 2, axis=0), 0.5, scope=scopes.leaf)[1]
    assert seen.nonfinite == 1 and np.all(np.isnan(seen.norms[2]))
    np.testing.assert_allclose(flat(total), flat(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"scope": scopes.leaf}, {"action": per_example.psac()}])
def test_no_example_moves_the_sum_by_more_than_its_bound(options):
    """Added to a batch, however large and wherever it points: by C, or √K · C for K blocks."""
    bound = 0.5 * (2**0.5 if "scope" in options else 1)
    step = jax.jit(oc.clipped_value_and_grad(loss, 0.5, reduce="sum", **options))
    base = flat(step(params(), batch(), weights=np.arange(B) > 0)[1])
    way = jnp.array([1.0, -1, 1, -1, 1, -1])
    others = [batch().at[0].set(size * way) for size in (0.1, 1.0, 10.0, -100.0)]
    ones = np.ones(B)
    moved = [np.linalg.norm(flat(step(params(), x, weights=ones)[1]) - base) for x in others]
    assert max(moved) <= bound * (1 + 1e-4) and max(moved) > 0.5 * bound


SCOPES = {
    "units": (1.0, scopes.units(0), "scope must be scopes.tree, scopes.leaf or scopes.groups"),
    "name": (
        {"in/w": 1.0},
        scopes.leaf,
        "max_norm must have one entry for each.*'out'. are missing",
    ),
    "no names": ({"in/w": 1.0}, scopes.tree, "max_norm is by the names of blocks"),
    "count": (jnp.ones(3), scopes.leaf, "max_norm must be one number, or 2, one per block"),
    "negative": ({"in/w": -1.0, "out": 1.0}, scopes.leaf, "max_norm\\['in/w'\\] must be a number"),
}


@pytest.mark.parametrize(("bounds", "scope", "message"), SCOPES.values(), ids=SCOPES)
def test_bounds_that_do_not_fit_are_refused(bounds, scope, message):
    with pytest.raises(ValueError, match=f"clipped_value_and_grad: {message}"):
        summed(batch(), bounds, scope=scope)


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
def test_the_gradient_without_the_clip_is_kept_beside(method):
    bad, weights = batch().at[2].set(jnp.nan), np.arange(B) % 3
    step = oc.clipped_value_and_grad(
        loss, 0.5, method=method, microbatch_size=3, keep_unclipped=True, scope=scopes.leaf
    )
    (_, seen), grads = jax.jit(step)(params(), bad, weights=weights)
    own = np.where(np.arange(B) == 2, 0, weights)
    want = [own @ np.nan_to_num(g) / weights.sum() for g in gradients(params(), bad)]
    np.testing.assert_allclose(flat(seen.unclipped), np.concatenate(want), rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(seen.unclipped) == jax.tree.structure(grads)


def over_devices(x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))


def test_over_eight_devices_and_in_another_order_it_is_the_same():
    options = {"scope": scopes.leaf, "action": per_example.psac(), "keep_unclipped": True}
    seen, total = summed(batch(), {"in/w": 0.3, "out": 0.8}, **options)
    others = over_devices(batch()), batch()[::-1]
    for same, total_of in [summed(x, {"in/w": 0.3, "out": 0.8}, **options) for x in others]:
        np.testing.assert_allclose(flat(total_of), flat(total), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(flat(same.unclipped), flat(seen.unclipped), rtol=1e-5, atol=1e-5)
