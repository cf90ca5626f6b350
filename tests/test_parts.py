"""Each part by itself, against NumPy or by hand, and the errors it raises."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.thresholds.blocks import learns, reads_params
from tests import reference

N = np.float32([0.0, 0.5, 1.0, 2.0, 1e10, 1e-20])
ONE = np.ones_like(N)

ACTIONS = {
    "rescale": (oc.actions.rescale, lambda n, b: min(1, b / n)),
    "normalize": (oc.actions.normalize, lambda n, b: b / n),
    "zero": (oc.actions.zero, lambda n, b: float(n <= b)),
    "smooth 1": (oc.actions.smooth(1.0), lambda n, b: b / (b + n)),
    "smooth 2": (oc.actions.smooth(2.0), lambda n, b: (1 + (n / b) ** 2) ** -0.5),
    "smooth inf": (oc.actions.smooth(jnp.inf), lambda n, b: min(1, b / n)),
    "band": (oc.actions.band(0.75), lambda n, b: np.clip(n, 0.75 * b, b) / n),
    "floor": (oc.actions.band(floor=0.75), lambda n, b: np.clip(n, 0.75, b) / n),
}


@pytest.mark.parametrize(("action", "formula"), ACTIONS.values(), ids=ACTIONS)
def test_actions_are_their_formulas(action, formula):
    factors = jax.jit(lambda bound: action(N, jnp.full_like(N, bound)))
    want = [1.0, *(formula(float(n), 1.0) for n in N[1:])]
    np.testing.assert_allclose(factors(1.0), want, rtol=1e-6)
    # No bound shortens nothing; an action that lengthens may still do so.
    lengthens = np.asarray(factors(1.0)) > 1
    np.testing.assert_array_equal(factors(jnp.inf)[1:][~lengthens[1:]], 1)
    assert not np.any(np.isnan(factors(0.0)))
    slope = jax.jit(jax.grad(lambda n: jnp.sum(action(n, jnp.ones_like(n)))))
    chex.assert_tree_all_finite(slope(N[:5]))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7, np.inf])
def test_norms_are_numpys(p):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    update = jax.jit(oc.clip_by(jnp.inf, norm=p).update)
    for scale, rtol in ((1.0, 1e-6), (1e-30, 1e-5), (1e30, 1e-5)):
        norm = update(x * np.float32(scale), None)[1].metrics.grad_norm
        np.testing.assert_allclose(norm / scale, np.linalg.norm(x.ravel(), p), rtol=rtol)


@pytest.mark.parametrize("p", [0.5, 0, -1, float("nan"), True, "2"])
def test_invalid_norms_are_rejected(p):
    with pytest.raises(ValueError, match="lp: p must be"):
        oc.norms.lp(p)


def bounds(threshold, norms, steps=1):
    """The bounds of the last of some steps with the same norms."""
    state = threshold.init(norms)
    for _ in range(steps):
        out, state = threshold.update(norms, state)
    return out


def test_thresholds_by_hand():
    n = jnp.array([1.0, 2.0])
    assert bounds(oc.thresholds.constant(3.0), n).tolist() == [3, 3]
    assert bounds(oc.thresholds.constant(jnp.array([3.0, 4.0])), n).tolist() == [3, 4]
    assert bounds(oc.thresholds.scheduled(lambda step: step.astype(float)), n, 3).tolist() == [2, 2]
    assert bounds(oc.thresholds.until(2, 1.0), n, 2).tolist() == [1, 1]
    assert bounds(oc.thresholds.until(2, 1.0), n, 3).tolist() == [np.inf, np.inf]
    assert bounds(
        oc.thresholds.until(1, 9.0, oc.thresholds.lag(optax.scale(2.0))), n, 2
    ).tolist() == [2, 4]
    assert bounds(oc.thresholds.at_most(optax.scale(2.0), 3.0), n).tolist() == [2, 3]
    assert bounds(oc.thresholds.at_least(optax.scale(2.0), 3.0), n).tolist() == [3, 4]


def test_a_state_made_by_computing_with_norms_moves_as_a_whole():
    """The engine cannot know which parts of it are kept per block."""
    last = optax.GradientTransformation(lambda n: n + 1.0, lambda n, state, params=None: (state, n))
    tx, grads = oc.clip_by(last, scope=oc.scopes.leaf), {"a": jnp.ones(1), "b": 3 * jnp.ones(1)}
    state = tx.init(grads)
    for bad, want in ((jnp.nan, [1, 1]), (2.0, [2, 3])):
        _, state = tx.update({**grads, "a": jnp.array([bad])}, state)
        np.testing.assert_array_equal(state.threshold, want)


@pytest.mark.parametrize("bad", [(), ("a",), ("b",), ("a", "b")], ids=str)
def test_a_counter_moves_where_any_block_is_finite(bad):
    tx = oc.clip_by(optax.constant_schedule(1.0), scope=oc.scopes.units())
    grads = {"a": jnp.ones((2, 2)), "b": jnp.ones((3, 2))}
    bad_grads = {**grads, **{name: jnp.nan * grads[name] for name in bad}}
    _, state = jax.jit(tx.update)(bad_grads, tx.init(grads))
    assert int(state.threshold.clip_step) == (len(bad) < 2)


def test_a_short_memory_is_free_of_bias():
    tx = oc.thresholds.running(1.0, 0.4, feed=oc.feeds.raw)
    state = tx.init(jnp.array(0.0))
    for norm in (1.0, 3.0, 0.0):  # a zero is not learned
        bound, state = tx.update(jnp.array(norm), state)
    np.testing.assert_allclose(bound, (0.4 * 1 + 3) / 1.4, rtol=1e-6)


def test_a_quantile_starts_at_the_first_norm():
    tx, norm = oc.thresholds.quantile(0.5, 0.2), jnp.array(7.0)
    _, state = tx.update(norm, tx.init(norm))
    np.testing.assert_allclose(tx.update(norm, state)[0], 7.0, rtol=1e-6)


def test_a_window_takes_the_largest_floats():
    tx, norm = oc.thresholds.window_zscore(window=3), jnp.full(1, 3e38)
    _, state = tx.update(norm, tx.init(norm))
    np.testing.assert_allclose(tx.update(norm, state)[0], norm, rtol=1e-6)


@pytest.mark.parametrize(("floor", "least"), [(0.5, 0.05), (None, np.inf)])
def test_a_share_of_the_parameters(floor, least):
    tx, sizes = oc.thresholds.param_relative(0.1, floor), jnp.array([0.0, 2.0])
    np.testing.assert_allclose(tx.update(sizes, tx.init(sizes), sizes)[0], [least, 0.2])


def test_lag_and_its_feeds():
    norms = [1.0, 2.0, 1e6, 1.0, jnp.nan, 1.0]

    def run(feed):
        threshold = oc.thresholds.lag(optax.scale(3.0), feed=feed)
        state, seen = threshold.init(jnp.array(0.0)), []
        for norm in norms:
            bound, state = threshold.update(jnp.array(norm), state)
            seen.append(float(bound))
        return seen

    assert run(oc.feeds.raw) == [np.inf, 3, 6, 3e6, 3, 3]
    assert run(oc.feeds.clipped) == [np.inf, 3, 6, 18, 3, 3]
    assert run(oc.feeds.accepted) == [np.inf, 3, 6, 6, 3, 3]


def test_per_block_is_one_rule_at_every_scope():
    threshold = oc.thresholds.per_block((0.0, 0), lambda n, s: (n + s[0], (s[0] + n, s[1] + 1)))
    for norms in (
        jnp.array(2.0),
        jnp.array([2.0, 2.0]),
        [jnp.full((1, 3), 2.0), jnp.full((2, 1), 2.0)],
    ):
        out = bounds(threshold, norms, 3)
        chex.assert_trees_all_equal(out, jax.tree.map(lambda n: n * 3, norms))


def test_groups_match_each_leaf_once():
    grads = {"attn": jnp.ones(2), "mlp": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"none or several: mlp \(none\)"):
        oc.clip_by_group_norm(1.0, {"attn": "a"}).init(grads)
    with pytest.raises(ValueError, match=r"attn \(a, b\)"):
        oc.clip_by_group_norm(1.0, {"attn": "a", "a|m": "b"}).init(grads)
    with pytest.raises(
        ValueError,
        match=r"max_norm must have one entry for each of the blocks .*\['x'\] are none of them",
    ):
        oc.clip_by_group_norm({"x": 1.0}, lambda path: path).update(grads, None)


def test_each_number_has_a_threshold_of_its_own():
    """Each of six series follows the paper's rule in NumPy."""
    rng = np.random.default_rng(0)
    series = np.exp(rng.normal(size=(2, 3, 1))) * np.exp(0.2 * rng.normal(size=(2, 3, 80)))
    series[:, 1, 40:] *= np.where(rng.random(40) < 0.1, 20, 1)
    signs = np.where(rng.random(series.shape) < 0.5, -1, 1)
    tx = oc.zclip(warmup_steps=10, scope=oc.scopes.element)

    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    grads = jnp.asarray(np.moveaxis(signs * series, -1, 0), jnp.float32)
    got = jax.lax.scan(step, tx.init(grads[0]), grads)[1]
    want = [[reference.zclip(one, warmup_steps=10) for one in row] for row in series]
    np.testing.assert_allclose(got, np.moveaxis(signs * want, -1, 0), rtol=2e-4)
    assert np.mean(np.array(want) < 0.99 * series) > 0.02


@pytest.mark.parametrize(("threshold", "size"), [(1.0, 24), (oc.thresholds.zscore(), 40)])
def test_the_state_per_element_has_the_documented_size(threshold, size):
    """The figures of docs/parts.md, in bytes."""
    tx = oc.clip_by(threshold, scope=oc.scopes.element)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((1000,), jnp.float32))
    assert round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1000) == size


def test_units_by_layout_and_layer():
    kernel = jnp.arange(24.0).reshape(2, 3, 4)
    flat = np.linalg.norm(np.asarray(kernel), axis=1, keepdims=True)

    def norms(scope, x=kernel):
        cut = scope.cut(["x"], [x.shape])
        return cut.axes[0]

    assert norms(oc.scopes.units(batch_axes=1)) == (1,)
    assert norms(oc.scopes.units(...)) == (0, 1, 2)
    assert norms(oc.scopes.units(), jnp.ones((2, 3, 4, 5))) == (0, 1, 2)
    assert norms(oc.scopes.units(..., batch_axes=1)) == (1, 2)
    assert norms(oc.scopes.units(axes=-1)) == (2,)
    assert norms(oc.scopes.units(axes=-3)) == (0,)
    assert norms(oc.scopes.units(axes=(0, 1)), jnp.ones(3)) == (0,)
    assert norms(oc.scopes.units(axes=lambda path: (0, 2))) == (0, 2)
    clipped, _ = oc.clip_by(1.0, scope=oc.scopes.units(batch_axes=1)).update(kernel, None)
    np.testing.assert_allclose(clipped, np.asarray(kernel) / np.maximum(flat, 1), rtol=1e-6)
    with pytest.raises(ValueError, match="no convention for the axes of a leaf of rank 6"):
        norms(oc.scopes.units(), jnp.ones((2,) * 6))
    with pytest.raises(ValueError, match="do not fit the leaf 'x'"):
        norms(oc.scopes.units(axes=3))


def test_floor_and_exclude():
    grads = {"embed": jnp.array([1e-4]), "w": jnp.array([3.0, 4.0])}
    lifted, _ = oc.clip_by_leaf_norm(1.0, min_norm=1e-2, exclude="^w").update(grads, None)
    np.testing.assert_allclose(lifted["embed"], 1e-2, rtol=1e-6)
    assert lifted["w"] is grads["w"]


def test_value_clip_keeps_nan_and_takes_schedules():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])
    np.testing.assert_array_equal(oc.clip(1.0).update(x, None)[0], [np.nan, 1, -1, 0.5])
    tx = oc.clip_by_value(lambda step: -step.astype(float), 2.0)
    _, state = tx.update(x, tx.init(x))
    np.testing.assert_array_equal(tx.update(x, state)[0], [np.nan, 2, -1, 0.5])
    with pytest.raises(ValueError, match="complex numbers have no order"):
        oc.clip_by_value(-1.0, 1.0).update(jnp.array([1j]), None)
    np.testing.assert_allclose(
        oc.clip(1.0).update(jnp.array([3 + 4j]), None)[0], [0.6 + 0.8j], rtol=1e-6
    )


@pytest.mark.parametrize(
    "text",
    [
        *("scopes.tree", "scopes.leaf", "scopes.element", "scopes.groups()", "scopes.units()"),
        *("scopes.units(...)", "scopes.units(-1)", "scopes.units(batch_axes=1)"),
        *("scopes.units((0, 1), batch_axes=1)", "scopes.stacked('^a', scopes.groups())"),
        *("scopes.stacked('^a')", "norms.l2", "norms.lp(3)", "per_example.psac(0.1)"),
        *(f"actions.{name}" for name in ("rescale", "normalize", "zero", "keep")),
        *(f"feeds.{name}" for name in ("raw", "clipped", "accepted")),
        *("actions.smooth(2.0)", "actions.band(0.5)", "actions.band(0.5, floor=0.1)"),
    ],
)
def test_a_part_shows_itself_as_one_writes_it(text):
    assert repr(eval(text, vars(oc))) == text


@pytest.mark.parametrize(
    ("clip", "threshold"),
    [
        (oc.zclip, oc.thresholds.zscore),
        (oc.clip_by_log_zscore, oc.thresholds.log_zscore),
        (oc.clip_by_median, oc.thresholds.median),
    ],
)
def test_a_threshold_has_the_defaults_of_its_paper(clip, threshold):
    """They equal those of the clip, which other tests compare with the paper."""
    own, papers = (inspect.signature(call).parameters for call in (threshold, clip))
    assert {n: own[n].default for n in own if n in papers} == {
        n: papers[n].default for n in papers if n in own
    }


@pytest.mark.parametrize(
    ("call", "name", "default"),
    [
        (oc.thresholds.percentile, "percentile", 10.0),  # AutoClip's
        (oc.thresholds.param_relative, "floor", 1e-3),  # of AGC, in its authors' code
        (oc.per_example.per_example_normalize, "gamma", 0.01),  # AUTO-S's
        (oc.per_example.psac, "r", 0.1),  # ours
        (oc.thresholds.window_zscore, "signed", False),
    ],
)
def test_defaults_are_the_papers(call, name, default):
    assert inspect.signature(call).parameters[name].default == default


REFUSED = {
    "scheduled": (lambda: oc.thresholds.scheduled(1.0), "scheduled: schedule must be a function"),
    "constant": (lambda: oc.thresholds.constant(-1.0), "constant: bound must be a number from 0"),
    "constant array": (
        lambda: oc.thresholds.constant(np.array([1.0, -1.0])),
        "constant: bound must be a number from 0",
    ),
    "constant on a device": (
        lambda: oc.thresholds.constant(jnp.array([1.0, jnp.nan])),
        "constant: bound must be a number from 0",
    ),
    "number on a device": (
        lambda: oc.thresholds.zscore(jnp.array(-1.0)),
        "zscore: z must be a number from 0",
    ),
    "nan on a device": (
        lambda: oc.thresholds.zscore(decay=jnp.array(jnp.nan)),
        "zscore: decay must be a number from 0 to below 1",
    ),
    "until": (
        lambda: oc.thresholds.until(-1, 1.0),
        "until: steps must be a whole number of steps, at least 0",
    ),
    "until float": (lambda: oc.thresholds.until(1.5, 1.0), "until: steps must be a whole number"),
    "until threshold": (lambda: oc.thresholds.until(1, -1.0), "until: threshold must be a number"),
    "at_least": (lambda: oc.thresholds.at_least(1.0, -1.0), "at_least: floor must be a number"),
    "at_most": (lambda: oc.thresholds.at_most(1.0, "2"), "at_most: cap must be a number"),
    "lag": (lambda: oc.thresholds.lag(None), "lag: threshold must be a number"),
    "learned": (
        lambda: oc.thresholds.learned(oc.thresholds.Statistic(0.0, max, max), warmup_steps=-1),
        "learned: warmup_steps must be a whole number of steps",
    ),
    "param_relative": (lambda: oc.thresholds.param_relative(-0.1), "param_relative: ratio must be"),
    "eps": (lambda: oc.clip_by_global_norm(1.0, eps=-1.0), "clip_by_global_norm: eps must be"),
    "smooth": (lambda: oc.actions.smooth(0.5), "smooth: p must be a number of at least 1"),
    "smooth on a device": (
        lambda: oc.actions.smooth(jnp.array(0.5)),
        "smooth: p must be a number of at least 1",
    ),
    "band": (lambda: oc.actions.band(2.0), "band: low must be a number from 0 to 1"),
    "exclude": (lambda: oc.clip(1.0, exclude=["a"]), "clip: exclude must be a regular expression"),
    "exclude limits": (
        lambda: oc.clip_by_value(-1, 1, exclude=["a"]),
        "clip_by_value: exclude must be",
    ),
    "exclude elements": (lambda: oc.adamw_clip(exclude=["a"]), "adamw_clip: exclude must be"),
    "exclude matrices": (
        lambda: oc.spectral_clip(1.0, exclude=["a"]),
        "spectral_clip: exclude must be",
    ),
    "spikes": (lambda: oc.skip_spikes(1.0), "skip_spikes: inner must be an optimizer"),
    "no skip": (
        lambda: oc.skip_spikes(optax.sgd(1.0), max_consecutive_skips=0),
        "skip_spikes: max_consecutive_skips must be",
    ),
    "not called": (
        lambda: oc.skip_spikes(oc.zclip),
        r"skip_spikes: inner must be .*, got the function zclip: write zclip\(...\), with parenth",
    ),
    "not finite": (lambda: oc.skip_nonfinite(1.0), "skip_nonfinite: inner must be an optimizer"),
    "reset": (lambda: oc.reset_moments(1.0), "reset_moments: inner must be an optimizer"),
    "stable": (
        lambda: oc.scale_by_stable_rms(optax.scale_by_adam),
        "scale_by_stable_rms: inner must be an optimizer",
    ),
    "value": (lambda: oc.clip_by_value(1.0, -1.0), "lower must not be larger"),
    "value nan": (lambda: oc.clip_by_value(float("nan"), 1.0), "clip_by_value: lower must be"),
    "shape": (
        lambda: oc.clip_by(jnp.ones(3)).update(jnp.ones(2), None),
        "clip_by: a bound must be one number, or one number per block",
    ),
    "choice": (
        lambda: oc.clip_by(1.0, nonfinite=np.ones(2)),
        "clip_by: nonfinite must be one of 'propagate', 'zero', got array",
    ),
    "label": (
        lambda: oc.clip_by_group_norm(1.0, {"b": "b"}).init({"a": jnp.ones(1)}),
        "clip_by_group_norm: every leaf must match exactly one group",
    ),
    "unit": (
        lambda: oc.clip_by(1.0, scope=oc.scopes.units(3)).update(jnp.ones((2, 2)), None),
        "clip_by: the axes 3 do not fit",
    ),
    "unit by name": (
        lambda: oc.clip_by(1.0, scope=oc.scopes.units("0")).init(jnp.ones((2, 2))),
        "clip_by: the axes '0' do not fit .* Pass an axis, a tuple of axes",
    ),
    "negative number of layer axes": (
        lambda: oc.adaptive_grad_clip(0.1, batch_axes=-1).init(jnp.ones((2, 2))),
        "adaptive_grad_clip: batch_axes must be a number of axes of the leaf '', .*, got -1",
    ),
    "unit from behind": (
        lambda: oc.clip_by(1.0, scope=oc.scopes.units(-3)).update(jnp.ones((2, 2)), None),
        "clip_by: the axes -3 do not fit",
    ),
    "schedule": (
        lambda: oc.clip_by(lambda step: "1").update(ONE, oc.clip_by(lambda step: 1.0).init(ONE)),
        "clip_by: the value of the schedule must be a number from 0",
    ),
    "no parameters": (
        lambda: oc.clip_by(oc.thresholds.param_relative(0.1)).update(jnp.ones(2), None),
        "clip_by: the bound is a share of the parameters' norm",
    ),
    "per example": (lambda: oc.per_example_global_norm_clip([jnp.ones(())], 1.0), "leading axis"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_rejected_at_construction(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        *("thresholds.running(-1.0)", "thresholds.previous(0.5)", "thresholds.quantile(2.0)"),
        *("thresholds.zscore(-1.0)", "thresholds.log_zscore(-1.0)", "thresholds.norm_ratio(-1.0)"),
        *("thresholds.window_zscore(-1.0)", "thresholds.percentile(-1.0)", "thresholds.median(-1)"),
        *("thresholds.window_zscore(warmup_steps=0)", "thresholds.running(relearn_after=0)"),
        *("norms.lp(0.5)", "scopes.groups(1)", "scopes.stacked(1)", "actions.band(-1.0)"),
    ],
)
def test_an_error_names_the_part(call):
    with pytest.raises(ValueError, match=f"^{call.split('(')[0]}: "):
        eval(call, vars(oc))


@pytest.mark.parametrize(
    "call",
    [
        *("thresholds.percentile(0.0)", "thresholds.percentile(100.0, window=1)"),
        *("thresholds.quantile(0.0)", "thresholds.quantile(1.0)", "thresholds.zscore(0.0, 0.0)"),
        *("thresholds.window_zscore(0.0, 1, warmup_steps=1)", "thresholds.until(0, 0.0)"),
        *("thresholds.running(relearn_after=1)", "thresholds.previous(1.0)"),
        *("actions.smooth(1.0)", "actions.band(0.0)", "actions.band(1.0)", "norms.lp(1)"),
        *("per_example.auto_s(0.0)", "clip_by(0.0)", "clip_by_value(1.0, 1.0)"),
    ],
)
def test_the_ends_of_a_range_are_in_it(call):
    eval(call, vars(oc))


@pytest.mark.parametrize("name", sorted(set(oc.thresholds.__all__) - {"Statistic"}))
def test_a_threshold_that_was_not_called_is_refused(name):
    with pytest.raises(ValueError, match=rf"write {name}\(\.\.\.\), with parentheses"):
        oc.clip_by(getattr(oc.thresholds, name))


@pytest.mark.parametrize("name", ["groups", "stacked", "units"])
def test_a_scope_that_was_not_called_is_refused(name):
    with pytest.raises(ValueError, match=rf"write {name}\(\.\.\.\), with parentheses"):
        oc.clip_by(1.0, scope=getattr(oc.scopes, name))


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: oc.thresholds.at_most(inner, 1.0),
        lambda inner: oc.thresholds.at_least(1.0, inner),
        lambda inner: oc.thresholds.until(3, 1.0, inner),
        lambda inner: oc.thresholds.param_relative(inner),
    ],
    ids=["at_most", "at_least", "until", "param_relative"],
)
def test_a_composite_of_a_learned_threshold_learns(make):
    assert learns(make(oc.thresholds.zscore()).update)
    # It bounds growth, and looks for no spikes.
    assert not learns(make(2.0).update) and not learns(make(oc.thresholds.previous()).update)


def test_a_bound_from_before_this_norm_is_learned():
    assert learns(oc.thresholds.lag(optax.scale(2.0)).update)


def test_a_norm_is_one_object_so_that_nothing_compiles_again_for_it():
    assert oc.norms.lp(3) is oc.norms.lp(3)
    for p, norm in ((1, oc.norms.l1), (2, oc.norms.l2), (np.inf, oc.norms.linf)):
        assert oc.norms.lp(p) is norm


SHARE = oc.thresholds.param_relative(0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: inner,
        lambda inner: oc.thresholds.at_most(inner, 1.0),
        lambda inner: oc.thresholds.at_least(1.0, inner),
        lambda inner: oc.thresholds.until(3, 1.0, inner),
        oc.thresholds.lag,
    ],
    ids=["itself", "at_most", "at_least", "until", "lag"],
)
def test_parameters_are_measured_only_for_what_reads_them(make):
    assert reads_params(make(SHARE)) and not reads_params(make(oc.thresholds.running()))


def test_a_threshold_of_the_users_may_take_no_scalar():
    tx = optax.GradientTransformation(
        lambda norms: norms[0], lambda norms, state, _: (norms, state)
    )
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    clip = oc.clip_by(tx, scope=oc.scopes.leaf)
    chex.assert_trees_all_close(clip.update(grads, clip.init(grads))[0], grads)


def test_an_example_that_is_not_finite_weighs_nothing():
    grads = {
        "a": jnp.array([[1.0, 0.0], [jnp.nan, 1e6], [0.0, 1e30]]),
        "b": jnp.array([[0.0], [1e6], [0.0]]),
    }
    sums, clipped = oc.per_example_global_norm_clip(grads, 1.0)
    chex.assert_trees_all_close(sums, {"a": jnp.array([1.0, 1.0]), "b": jnp.zeros(1)}, rtol=1e-6)
    assert clipped == 2
