"""Private training beyond a single clip: actions, bounds by layer, users, a privately learned bound
and error feedback. Each is tested against its paper in NumPy, and for its guarantee: how far one
example can move the result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip import actions, per_example, scopes

B = 8


def normal(*shape, seed=0):
    """Drawn by NumPy, because `jax.random` compiles a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    """Ghost clipping applies to `in/w`, but not to `head`."""
    return {"head": normal(4), "in": {"w": normal(6, 4, seed=1)}}


def batch(seed=1):
    """Examples whose sizes differ by a factor of 1,000."""
    return normal(B, 6, seed=seed) * np.logspace(-2, 1, B, dtype=np.float32)[:, None]


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["in"]["w"]) * p["head"]) ** 2


gradient_of_each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))


def gradients(p, examples):
    """The gradient of each example, (B, 4) and (B, 24) in float64."""
    grads = gradient_of_each(p, examples)
    return [np.asarray(g, np.float64).reshape(len(examples), -1) for g in jax.tree.leaves(grads)]


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def summed(examples, *args, weights=None, **options):
    step = oc.clipped_value_and_grad(loss, *args, reduce="sum", **options)
    (_, seen), total = jax.jit(step)(params(), examples, weights=weights)
    return seen, total


# The factor for an example of norm n at the bound b, according to the papers.
FACTORS = {
    "clip": (None, lambda n, b: min(1, b / n)),
    "normalize": (actions.normalize, lambda n, b: b / n),
    "AUTO-S": (per_example.auto_s(), lambda n, b: b / (n + 0.01)),
    "AUTO-V": (per_example.auto_s(0.0), lambda n, b: b / n),
    "PSAC": (per_example.psac(0.3), lambda n, b: b / (n + 0.3 / (n + 0.3))),
    "drop": (actions.zero, lambda n, b: float(n <= b)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_an_action_matches_its_paper_and_respects_the_bound(name):
    action, factor = FACTORS[name]
    grads, bound = np.concatenate(gradients(params(), batch()), axis=1), 0.7
    norms = np.linalg.norm(grads, axis=1)
    assert norms.min() < 0.1 * bound and norms.max() > 2 * bound
    each = grads * np.array([factor(n, bound) for n in norms])[:, None]
    _, total = summed(batch(), bound, action=action, method="ghost")
    np.testing.assert_allclose(flat(total), each.sum(0), rtol=1e-4, atol=1e-5)
    clip = jax.jit(lambda grads: per_example.per_example_global_norm_clip(grads, bound, action))
    formed, _ = clip(jnp.float32(grads))
    np.testing.assert_allclose(formed, each.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FACTORS)
def test_no_action_makes_an_example_longer_than_its_bound(name):
    norms = np.r_[np.logspace(-30, 30, 200), 0].astype(np.float32)
    action = jax.jit(FACTORS[name][0] or actions.rescale)
    factors = np.asarray(action(norms, np.full_like(norms, 0.7)))
    assert np.all(norms * factors <= 0.7 * (1 + 1e-6)) and np.all(np.isfinite(factors))


@pytest.mark.parametrize("make", [per_example.auto_s, per_example.psac])
def test_without_a_bound_nothing_changes_and_derivatives_are_finite(make):
    norms = jnp.array([0.0, 1e-20, 2.0])
    np.testing.assert_array_equal(make()(norms, jnp.full(3, jnp.inf)), 1)
    for bound in (1.0, jnp.inf):
        slope = jax.grad(lambda n, b=bound: jnp.sum(n * make()(n, jnp.full(3, b))))(norms)
        assert jnp.all(jnp.isfinite(slope))


def test_invalid_numbers_are_rejected():
    with pytest.raises(ValueError, match="auto_s: gamma must be a number from 0"):
        per_example.auto_s(-1.0)
    with pytest.raises(ValueError, match="psac: r must be a number larger than 0"):
        per_example.psac(0.0)


BLOCKS = {
    "leaf": (scopes.leaf, {"in/w": 0.3, "head": 0.8}),
    "groups": (scopes.groups({"in": "first", "head": "rest"}), {"first": 0.3, "rest": 0.8}),
}


@pytest.mark.parametrize("method", ["ghost", "microbatch"])
@pytest.mark.parametrize("name", BLOCKS)
def test_bounds_by_block_match_clipping_each_block_alone(name, method):
    scope, bounds = BLOCKS[name]
    seen, total = summed(batch(), bounds, scope=scope, method=method, microbatch_size=3)
    norms = [np.linalg.norm(g, axis=1) for g in gradients(params(), batch())]
    want = [
        np.minimum(1, b / n) @ g
        for b, n, g in zip((0.8, 0.3), norms, gradients(params(), batch()), strict=True)
    ]
    np.testing.assert_allclose(seen.norms, np.stack(norms, axis=1), rtol=1e-5)
    np.testing.assert_allclose(flat(total), np.concatenate(want), rtol=1e-5, atol=1e-6)
    assert seen.clipped == np.sum((norms[0] > 0.8) | (norms[1] > 0.3))
    as_array = summed(batch(), jnp.array([0.8, 0.3]), scope=scope, method=method)[1]
    np.testing.assert_allclose(flat(as_array), flat(total), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.groups()], ids=["leaf", "module"])
def test_blocks_of_leaves_alike_and_of_any_size(scope):
    """Leaves of equal shape are measured together, but each norm belongs to its own block."""
    sizes = np.float32([1.0, 1e-30, 0.0, 1e20, 3.0])
    params = {"h": [{"b": jnp.zeros(()), "w": jnp.zeros(3)} for _ in sizes]}

    def linear(p, x):
        return sum(c * (h["b"] * x[0] + h["w"] @ x) for c, h in zip(sizes, p["h"], strict=True))

    x = np.array([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0]])
    both = np.stack([x[:, 0], np.linalg.norm(x, axis=1)], axis=1)  # of b and w
    each = both if scope is scopes.leaf else np.linalg.norm(both, axis=1, keepdims=True)
    want = np.concatenate([c * each for c in np.float64(sizes)], axis=1)
    step = oc.clipped_value_and_grad(linear, 1.0, scope=scope, method="microbatch")
    (_, seen), _ = jax.jit(step)(params, jnp.float32(x))
    np.testing.assert_allclose(seen.norms, want, rtol=1e-6)


def test_an_example_that_is_not_finite_in_one_block_is_left_out_of_all():
    """The derivative of the root at 0 is infinite; the loss and the other block are finite."""
    params = {"a": jnp.zeros(()), "b": jnp.ones(())}
    rooted = lambda p, x: 2 * p["a"] + jnp.sqrt(p["b"] * x)  # noqa: E731
    step = oc.clipped_value_and_grad(rooted, 5.0, scope=scopes.leaf, reduce="sum")
    (_, seen), total = step(params, jnp.array([4.0, 0.0, 1.0]))
    assert seen.nonfinite == 1 and np.all(np.isnan(seen.norms[1])) and np.isfinite(seen.losses[1])
    np.testing.assert_allclose(flat(total), [4.0, 1.5])


@pytest.mark.parametrize("options", [{}, {"scope": scopes.leaf}, {"action": per_example.psac()}])
def test_no_example_moves_the_sum_by_more_than_its_bound(options):
    """An added example of any size moves it by at most C, or √K · C for K blocks."""
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
        "max_norm must have one entry for each.*'head'. are missing",
    ),
    "no names": ({"in/w": 1.0}, scopes.tree, "max_norm is a mapping by block name"),
    "count": (jnp.ones(3), scopes.leaf, "max_norm must be one number, or 2, one per block"),
    "negative": ({"in/w": -1.0, "head": 1.0}, scopes.leaf, "max_norm\\['in/w'\\] must be a number"),
}


@pytest.mark.parametrize(("bounds", "scope", "message"), SCOPES.values(), ids=SCOPES)
def test_mismatched_bounds_are_rejected(bounds, scope, message):
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


def test_the_result_does_not_depend_on_devices_or_order():
    options = {"scope": scopes.leaf, "action": per_example.psac(), "keep_unclipped": True}
    seen, total = summed(batch(), {"in/w": 0.3, "head": 0.8}, **options)
    others = over_devices(batch()), batch()[::-1]
    for same, total_of in [summed(x, {"in/w": 0.3, "head": 0.8}, **options) for x in others]:
        np.testing.assert_allclose(flat(total_of), flat(total), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(flat(same.unclipped), flat(seen.unclipped), rtol=1e-5, atol=1e-5)


USERS = np.array([4, 9, -1, 4, 0, 9, 4, 4])
GROUPED = {0: [4], 4: [0, 3, 6], 9: [1, 5]}  # at most three examples of each


def by_user(examples, users=USERS, max_examples=3, **options):
    groups = per_example.group_by_user(examples, users, max_examples=max_examples, max_users=4)
    reduce = options.pop("of_user", "mean")
    step = oc.clipped_value_and_grad(
        per_example.user_loss(loss, reduce=reduce), 0.5, reduce="sum", **options
    )
    return step(params(), groups, weights=groups[1].any(axis=1))


@pytest.mark.parametrize(
    ("method", "reduce"), [("ghost", "mean"), ("microbatch", "sum"), ("ghost", "sum")]
)
def test_a_user_is_clipped_as_one(method, reduce):
    (_, seen), total = jax.jit(
        lambda x: by_user(x, of_user=reduce, method=method, microbatch_size=2)
    )(batch())
    grads, want, norms = np.concatenate(gradients(params(), batch()), axis=1), 0, []
    for own in GROUPED.values():
        g = getattr(grads[own], reduce)(axis=0)
        norms.append(np.linalg.norm(g))
        want = want + g * min(1, 0.5 / norms[-1])
    np.testing.assert_allclose(seen.norms[:3], norms, rtol=1e-4)
    np.testing.assert_allclose(flat(total), want, rtol=1e-4, atol=1e-5)
    assert seen.clipped == sum(n > 0.5 for n in norms) and seen.nonfinite == 0


def test_grouping_by_user_matches_a_loop():
    rng = np.random.default_rng(0)
    users, highest = rng.integers(-2, 6, 60), np.iinfo(np.int32).max
    users[users == 5] = highest
    place = jax.jit(lambda x, u: per_example.group_by_user(x, u, max_examples=9, max_users=7))
    examples, present = place({"x": jnp.arange(60)}, jnp.int32(users))
    for row, user in enumerate([0, 1, 2, 3, 4, highest]):
        own = np.flatnonzero(users == user)[:9]
        assert examples["x"][row][present[row]].tolist() == own.tolist()
        assert np.all(np.isin(examples["x"][row], own))
    assert not present[6].any() and present[:6].sum(axis=1).min() < 9 == present.sum(axis=1).max()
    few, _ = per_example.group_by_user(
        np.arange(3), np.array([5, 1, 3]), max_examples=1, max_users=2
    )
    assert few.tolist() == [[1], [2]]


def test_no_user_moves_the_sum_by_more_than_the_bound_and_the_order_does_not_matter():
    step = jax.jit(lambda x, users: by_user(x, users, method="ghost")[1])
    base = flat(step(batch(), np.where(USERS == 4, -1, USERS)))
    of_four = jnp.array(USERS == 4)[:, None]
    way = jnp.array([[1.0, -1, 1, -1, 1, -1]])
    others = [jnp.where(of_four, size * way, batch()) for size in (0.1, 1.0, 100.0)]
    moved = [np.linalg.norm(flat(step(x, USERS)) - base) for x in others]
    assert 0.25 < max(moved) <= 0.5 * (1 + 1e-4)
    order = np.array([1, 2, 0, 4, 3, 5, 6, 7])  # the fourth of user 4 stays last, and is left out
    reordered = flat(step(batch()[order], USERS[order]))
    np.testing.assert_allclose(reordered, flat(step(batch(), USERS)), rtol=1e-4, atol=1e-6)


def test_one_example_per_user_matches_the_clip_of_examples():
    _, want = summed(batch(), 0.5)
    groups = per_example.group_by_user(batch(), np.arange(B), max_examples=2)
    of_user = per_example.user_loss(loss)
    step = oc.clipped_value_and_grad(of_user, 0.5, reduce="sum", method="microbatch")
    got = jax.jit(step)(params(), groups)[1]
    np.testing.assert_allclose(flat(got), flat(want), rtol=1e-5, atol=1e-6)


def test_a_nonfinite_example_drops_its_user_and_no_other():
    step = jax.jit(lambda x, users: by_user(x, users, method="ghost"))
    (_, seen), total = step(batch().at[0].set(jnp.nan), USERS)
    _, want = step(batch(), np.where(USERS == 4, -1, USERS))
    assert seen.nonfinite == 1
    np.testing.assert_allclose(flat(total), flat(want), rtol=1e-5, atol=1e-6)


WRONG_USERS = {
    "shape": (np.zeros(3, int), "8 integers, one per example"),
    "dtype": (np.zeros(B), "8 integers, one per example"),
    "64 bits": (2**40 + np.arange(B), "integers of 32 bits: write np.unique"),
}


@pytest.mark.parametrize(("users", "message"), WRONG_USERS.values(), ids=WRONG_USERS)
def test_invalid_users_are_rejected(users, message):
    with pytest.raises(ValueError, match=f"group_by_user: users must be {message}"):
        per_example.group_by_user(np.arange(B), users, max_examples=2)


def andrew(norms, weights, draws, start, q=0.6, rate=0.3, size=5.0, sigma=0.7):
    """The bound before each batch: Andrew et al., with the shift and the limits of their code."""
    bound, out = start, []
    for batch_norms, batch_weights, draw in zip(norms, weights, draws, strict=True):
        out.append(bound)
        count = 0.0
        for n, w in zip(batch_norms, batch_weights, strict=True):
            if w > 0:
                count += (q if not np.isfinite(n) else float(n <= bound)) - 0.5
        share = min(max(0.5 + (count + sigma * draw) / size, 0.0), 1.0)
        bound = bound * np.exp(-rate * (share - q))
    return np.array(out)


def test_the_private_quantile_matches_the_paper_in_a_scan():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=(40, 6)))
    norms[5, 2], norms[9, 1] = np.nan, np.inf
    weights = rng.integers(0, 3, (40, 6))
    tracker = per_example.private_quantile(0.6, 0.3, 0.5, batch_size=5, noise=0.7)
    first = tracker.init(jax.random.key(3))

    def step(state, seen):
        after = tracker.update(*seen[:1], state, weights=seen[1])
        return after, (state.bound, jax.random.normal(jax.random.split(state.key)[1]))

    _, (bounds, draws) = jax.lax.scan(step, first, (jnp.float32(norms), jnp.int32(weights)))
    assert np.std(draws) > 0.5  # a new draw at each step
    np.testing.assert_allclose(bounds, andrew(norms, weights, draws, 0.5), rtol=1e-4)


def test_the_private_quantile_finds_the_quantile_of_each_block():
    tracker = per_example.private_quantile(0.75, init=[0.1, 50.0], batch_size=64)
    norms = jnp.exp(normal(200, 64, 2) + np.float32([[[0.0, 3.0]]]))
    update = lambda state, seen: (tracker.update(seen, state), None)  # noqa: E731
    state, _ = jax.lax.scan(update, tracker.init(jax.random.key(0)), norms)
    want = np.quantile(np.asarray(norms), 0.75, axis=(0, 1))
    np.testing.assert_allclose(state.bound, want, rtol=0.15)


def test_one_example_moves_the_count_by_half():
    """Any norm, NaN included. The count is read off the bound, without noise."""
    tracker = per_example.private_quantile(0.9, 1.0, 1.0, batch_size=4, noise=0.0)
    state, rest = tracker.init(jax.random.key(0)), jnp.arange(6) > 0
    norms = jnp.array([0.0, 0.5, 2.0, 0.1, 3.0, 1.0])
    update = jax.jit(lambda x, w: tracker.update(x, state, weights=w).bound)
    share = lambda x, w: 4 * (0.9 - np.log(update(x, w)))  # noqa: E731
    base = share(norms, rest)
    moved = [
        share(norms.at[0].set(n), jnp.ones(6)) - base for n in (0.0, 1.0, 5.0, jnp.nan, jnp.inf)
    ]
    np.testing.assert_allclose(moved, [0.5, 0.5, -0.5, 0.4, 0.4], atol=1e-5)


def test_the_private_quantile_over_eight_devices():
    norms = jnp.exp(normal(16))
    spec, whole = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    make = lambda axes: per_example.private_quantile(init=0.5, batch_size=16, axis_names=axes)  # noqa: E731
    tracker = make(None)
    state = tracker.init(jax.random.key(0))
    want = jax.jit(tracker.update)(norms, state)
    for typed, axes in [(True, None), (False, "data")]:
        update = jax.shard_map(
            lambda n, s, axes=axes: make(axes).update(n, s),
            mesh=mesh,
            in_specs=(spec, whole),
            out_specs=whole,
            check_vma=typed,
        )
        np.testing.assert_allclose(jax.jit(update)(norms, state).bound, want.bound, rtol=1e-6)
    spread = jax.jit(tracker.update)(over_devices(norms), state)
    np.testing.assert_allclose(spread.bound, want.bound, rtol=1e-6)


def test_invalid_numbers_of_the_private_quantile_are_rejected():
    for wrong, message in [
        ({"quantile": 2.0}, "quantile must be a number from 0 to 1"),
        ({"init": 0.0}, "init must be a number larger than 0"),
        ({"noise": -1.0}, "noise must be a number from 0"),
        ({"batch_size": 0}, "batch_size must be a number larger than 0"),
    ]:
        with pytest.raises(ValueError, match=f"private_quantile: {message}"):
            per_example.private_quantile(**{"batch_size": 4, **wrong})
    tracker = per_example.private_quantile(init=[0.1, 0.2], batch_size=2)
    with pytest.raises(ValueError, match="private_quantile: norms must have a leading axis"):
        tracker.update(jnp.ones(2), tracker.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="private_quantile: weights must be 2 real numbers"):
        tracker.update(jnp.ones((2, 2)), tracker.init(jax.random.key(0)), weights=jnp.ones(3))


def dice(stacks, bound, cap):
    """The updates of DiceSGD without noise; `stacks` is (steps, B, D)."""
    shorten = lambda x, c: x * min(1, c / max(np.linalg.norm(x), 1e-30))  # noqa: E731
    error, out = np.zeros(stacks.shape[2]), []
    for grads in stacks:
        v = np.mean([shorten(g, bound) for g in grads], axis=0) + shorten(error, cap)
        error = error + grads.mean(axis=0) - v
        out.append(v)
    return np.array(out)


def test_error_feedback_is_dice_sgd():
    tx, p = per_example.error_feedback(0.6), params()
    step = oc.clipped_value_and_grad(loss, 0.3, keep_unclipped=True)

    def one(state, examples):
        (_, seen), grads = step(p, examples)
        updates, state = tx.update(grads, state, p, unclipped=seen.unclipped)
        return state, updates

    batches = jnp.stack([0.5 * batch(seed) for seed in range(1, 7)])  # e is within its bound first
    _, got = jax.jit(lambda: jax.lax.scan(one, tx.init(p), batches))()
    stacks = np.stack([np.concatenate(gradients(p, x), axis=1) for x in batches])
    want = dice(stacks, 0.3, 0.6)
    got = np.concatenate([np.reshape(x, (6, -1)) for x in jax.tree.leaves(got)], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert 0.6 < np.linalg.norm(got, axis=1).max() <= 0.3 + 0.6  # whatever the error has become


def test_error_feedback_converges_where_clipping_alone_does_not():
    """Two examples pull towards 0 and one towards 8, each by at most 1. The mean is 8/3; clipping
    alone stops near the two.
    """
    targets = jnp.array([0.0, 0.0, 8.0])
    grad = oc.clipped_value_and_grad(
        lambda w, t: 0.5 * (w - t) ** 2, 1.0, keep_unclipped=True, method="microbatch"
    )

    def train(cap):
        tx, start = per_example.error_feedback(cap), jnp.zeros(())

        def step(carry, _):
            w, state = carry
            (_, seen), g = grad(w, targets)
            g, state = tx.update(g, state, w, unclipped=seen.unclipped)
            return (w - 0.05 * g, state), None

        return jax.lax.scan(step, (start, tx.init(start)), length=400)[0][0]

    np.testing.assert_allclose(train(3.0), 8 / 3, atol=0.01)
    np.testing.assert_allclose(train(0.0), 0.5, atol=0.01)


def test_error_feedback_keeps_its_state_and_dtypes_over_a_bad_step():
    tx = per_example.error_feedback(1.0)
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3)}
    state = tx.init(jax.eval_shape(lambda: grads))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    _, state = tx.update(grads, state, unclipped=jax.tree.map(lambda g: 2 * g, grads))
    bad = {**grads, "b": grads["b"].at[1].set(jnp.nan)}
    updates, after = tx.update(grads, state, unclipped=bad)
    assert updates["a"].dtype == jnp.bfloat16 and jnp.all(jnp.isfinite(updates["b"]))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    with pytest.raises(ValueError, match="error_feedback: update needs unclipped="):
        tx.update(grads, state)


def test_chunks_in_a_scan_sum_to_the_whole_batch():
    """So noise can be added once, after the scan."""
    step = oc.clipped_value_and_grad(loss, 0.5, reduce="sum")

    def chunked(examples):
        add = lambda total, chunk: (jax.tree.map(jnp.add, total, step(params(), chunk)[1]), None)  # noqa: E731
        zeros = jax.tree.map(jnp.zeros_like, params())
        return jax.lax.scan(add, zeros, examples.reshape(4, 2, -1))[0]

    _, want = summed(batch(), 0.5)
    np.testing.assert_allclose(flat(jax.jit(chunked)(batch())), flat(want), rtol=1e-5, atol=1e-6)
