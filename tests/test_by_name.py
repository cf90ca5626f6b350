"""Each group has its own schedule or threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import scopes, thresholds

PARTS = {"attn": "attn", "mlp": "mlp", "embed": "rest"}
MIXED = {
    "attn": thresholds.norm_ratio(2.0),
    "mlp": lambda step: 4.0 - step.astype(float),
    "rest": 1.0,
}


def steps(tx, factors):
    """The final state; gradients are ones times `factors`, which has a row per step."""
    grads = {name: jnp.ones(1) for name in ("attn", "embed", "mlp")}
    state, update = tx.init(grads), jax.jit(tx.update)
    bounds = []
    for row in factors:
        now = {name: g * f for (name, g), f in zip(grads.items(), row, strict=True)}
        updates, state = update(now, state)
        bounds.append(state.metrics.clip_bound)
    return np.array(bounds), updates, state


def test_each_group_has_its_own_threshold():
    """`attn` is bounded by twice the mean of its own norms, whatever the other norms are."""
    bounds, updates, state = steps(
        oc.clip_by_group_norm(MIXED, PARTS), [(1.0, 50.0, 2.0), (1.0, 0.0, 2.0), (9.0, 7.0, 9.0)]
    )
    np.testing.assert_allclose(bounds, [[np.inf, 1, 4], [2, 1, 3], [2, 1, 2]])
    assert [float(u[0]) for u in updates.values()] == [2.0, 1.0, 2.0]
    assert oc.metrics(state)["clip/clipped/attn"] == 1


def test_a_bad_group_does_not_move_the_threshold_of_another():
    bounds, updates, state = steps(
        oc.clip_by_group_norm(MIXED, PARTS), [(1.0, 1.0, 1.0), (2.0, jnp.nan, 1.0), (9.0, 1.0, 1.0)]
    )
    np.testing.assert_allclose(bounds[2, 0], 2 * 1.05)
    assert state.threshold[1].blocks.seen.tolist() == [3, 2, 3]
    assert np.isfinite([u[0] for u in updates.values()]).all()


def test_thresholds_by_name_work_inside_other_thresholds():
    """A cap, a lag and a warm-up pass the names on to the thresholds they contain."""
    inner = thresholds.by_name({"attn": 3.0, "embed": 1.0, "mlp": 2.0})
    last = thresholds.Statistic(0.0, lambda n, v, s: n, lambda n, v, s: v)
    outer = {
        "at_most": thresholds.at_most(inner, 2.5),
        "until": thresholds.until(9, inner),
        "param_relative": thresholds.param_relative(inner),
        "warmup": thresholds.learned(last, warmup=inner),
    }
    grads = {name: jnp.ones(1) for name in ("attn", "embed", "mlp")}
    for name, threshold in outer.items():
        tx = oc.clip_by(threshold, scope=scopes.leaf)
        bounds = tx.update(grads, tx.init(grads), grads)[1].metrics.clip_bound
        np.testing.assert_allclose(bounds, [2.5 if name == "at_most" else 3.0, 1.0, 2.0])


ERRORS = [
    ({"attn": -1.0, "rest": 1.0}, r"max_norm\['attn'\] must be a number from 0 to inf, got -1.0"),
    ({"attn": [1.0, -1.0]}, r"max_norm\['attn/1'\] must be a number from 0"),
    ({"attn": thresholds.zscore}, r"max_norm\['attn'\] must be .*: write zscore\(...\)"),
    ({"attn": oc.zclip()}, r"max_norm\['attn'\] must be .*; this is a clip already"),
    (
        {"attn": optax.adam(0.1)},
        r"max_norm\['attn'\] must be .* of norms; this one takes",
    ),
    ({"attn": 1.0, "rest": 1.0}, r"\['mlp'\] are missing\."),
    ({**MIXED, "mpl": 1.0}, r"\]: \['mpl'\] are none of them"),
]


@pytest.mark.parametrize(("bounds", "message"), ERRORS)
def test_errors(bounds, message):
    with pytest.raises(ValueError, match=f"clip_by_group_norm: .*{message}"):
        steps(oc.clip_by_group_norm(bounds, PARTS), [(1.0, 1.0, 1.0)])


@pytest.mark.parametrize("scope", [scopes.tree, scopes.units()], ids=repr)
def test_blocks_without_names_are_rejected(scope):
    with pytest.raises(ValueError, match="clip_by: bounds is a mapping by block name"):
        steps(oc.clip_by(thresholds.by_name({"a": 1.0}), scope=scope), [(1.0, 1.0, 1.0)])
