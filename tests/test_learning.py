"""Laws of everything with a history: the state keeps its structure, and nothing nonfinite enters
it.
"""

import itertools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.base import Metrics
from tests.cases import ADAPTIVE, HOLDERS, OTHERS
from tests.conftest import allow

SCOPES = {
    "tree": optaxclip.scopes.tree,
    "groups": optaxclip.scopes.groups(),
    "units": optaxclip.scopes.units(),
}
MAKE = {
    f"{case.name} {name}": (case.make, scope) for case in ADAPTIVE for name, scope in SCOPES.items()
}
MAKE = {
    name: lambda make=make, scope=scope: make(scope=scope) for name, (make, scope) in MAKE.items()
}
MAKE |= OTHERS | HOLDERS
by_tree = [name for name in MAKE if not name.endswith((" groups", " units"))]
each_by_tree = pytest.mark.parametrize("make", [MAKE[name] for name in by_tree], ids=by_tree)


def tree(dtype):
    """A small tree of one dtype, or of several."""
    rng = np.random.default_rng(0)
    own = ["float32", "bfloat16"] if dtype == "mixed" else [dtype] * 2
    leaf = {"bias": (3,), "kernel": (4, 3)}
    return {
        "layer": {
            name: jnp.asarray(rng.normal(size=leaf[name]), d)
            for name, d in zip(leaf, own, strict=True)
        }
    }


def learned(state):
    """The state without its metrics, which do count nonfinite steps."""
    return jax.tree.map(
        lambda x: None if isinstance(x, Metrics) else x,
        state,
        is_leaf=lambda x: isinstance(x, Metrics),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, "mixed") for n in MAKE] + [(n, "float64") for n in by_tree[::3]]
)
def test_the_state_keeps_its_form_from_the_first_step(name, dtype):
    with allow(dtype):
        tx, grads = MAKE[name](), tree(dtype)

        def step(state, factor):
            now = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
            updates, state = tx.update(now, state, grads)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
            return state, updates

        start = tx.init(grads)
        state, updates = jax.jit(
            lambda s: jax.lax.scan(step, s, jnp.array([1.0, 0.0, 3.0], jnp.float32))
        )(start)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        chex.assert_tree_all_finite(updates)
        assert all(np.any(np.asarray(u[2], np.float64)) for u in jax.tree.leaves(updates)), "frozen"


@pytest.mark.slow
@each_by_tree
def test_nothing_is_learned_from_nonfinite_gradients(make):
    tx, grads = make(), tree("float32")
    step = jax.jit(tx.update)
    _, state = step(grads, tx.init(grads), grads)
    for bad in (jnp.nan, jnp.inf):
        poisoned = state
        for _ in range(3):
            _, poisoned = step(
                jax.tree.map(lambda g, bad=bad: g.at[0].set(bad), grads), poisoned, grads
            )
        assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(learned(poisoned))), bad
        updates, _ = step(grads, poisoned, grads)
        chex.assert_tree_all_finite(updates)


# The engine applies the policy and thresholds never see it, so one of the two is enough per row.
@pytest.mark.parametrize(
    ("case", "nonfinite"),
    list(zip(ADAPTIVE, itertools.cycle(["propagate", "zero"]))),
    ids=lambda x: getattr(x, "name", x),
)
def test_a_nonfinite_step_leaves_the_threshold_unchanged(case, nonfinite):
    tx, grads = case.make(scope=optaxclip.scopes.leaf, nonfinite=nonfinite), tree("float32")
    step = jax.jit(tx.update)
    _, state = step(grads, tx.init(grads), grads)
    out, poisoned = step(jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads), state, grads)
    assert all(
        np.isnan(x).all() if nonfinite == "propagate" else not x.any() for x in jax.tree.leaves(out)
    )
    chex.assert_trees_all_equal(learned(poisoned), learned(state))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in by_tree if name not in HOLDERS])
def test_non_gradients_pass_through(name):
    others = {"count": jnp.arange(3), "none": None, "masked": optax.MaskedNode(), "empty": {}}
    grads = {"kernel": jnp.full((4, 3), 2.0), "nothing": jnp.zeros((0, 3)), **others}
    tx = MAKE[name]()
    updates, state = tx.update(grads, tx.init(grads), grads)
    updates, _ = tx.update(grads, state, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert np.all(np.isfinite(updates["kernel"])) and updates["nothing"].shape == (0, 3)
    assert updates["count"].dtype == jnp.int32
    assert tx.update({}, tx.init({}), {})[0] == {}


NAMED = [
    "adagc",
    "adamw_clip",
    "autoclip",
    "band_clip",
    "clip_by_log_zscore",
    "clip_by_median",
    "clip_by_momentum_norm",
    "clip_by_running_max",
    "clippy",
    "limit_norm_growth",
    "normalize_by_moments",
    "quantile_clip",
    "scale_by_acclip",
    "spam_clip",
    "zclip",
]
SIZES = {"autoclip": ("window",), "clip_by_median": ("window", "every")}


@pytest.mark.parametrize("name", NAMED)
def test_numbers_can_be_injected(name):
    """`optax.inject_hyperparams` turns all numeric arguments into arrays, except those that set the
    size of a state.
    """
    algorithm, grads = getattr(optaxclip, name), tree("float32")

    def second_update(tx):
        _, state = tx.update(grads, tx.init(grads), grads)
        return tx.update(grads, state, grads)[0]

    @jax.jit
    def both():
        injected = optax.inject_hyperparams(algorithm, static_args=SIZES.get(name, ()))
        return second_update(injected()), second_update(algorithm())

    with jax.numpy_dtype_promotion("standard"):
        chex.assert_trees_all_close(*both(), rtol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_an_injected_size_is_rejected_with_the_fix(name):
    with pytest.raises(ValueError, match=r"static_args=\('window',\)"):
        optax.inject_hyperparams(getattr(optaxclip, name))().init(tree("float32"))


BAD = {
    "autoclip": [
        {"percentile": -1.0},
        {"percentile": 101.0},
        {"window": 0},
        {"window": 2.5},
        {"update_first": "during"},
    ],
    "zclip": [
        {"z": -1.0},
        {"decay": 1.0},
        {"decay": "0.9"},
        {"target": "median"},
        {"max_norm": -1.0},
    ],
    "clip_by_log_zscore": [{"z": jnp.nan}, {"target": "adaptive"}, {"update_first": "during"}],
    "adagc": [{"ratio": 1.0}, {"ratio": True}, {"decay": -0.1}, {"max_norm": -1.0}],
    "quantile_clip": [{"quantile": 1.5}, {"learning_rate": -1.0}, {"init": -1.0}],
    "clip_by_median": [{"scale": -1.0}, {"every": 0}],
    "limit_norm_growth": [{"ratio": 0.9}, {"min_norm": -1.0}],
    "clip_by_momentum_norm": [{"ratio": 2.0}, {"decay": 1.0}],
    "band_clip": [{"low": 1.5}, {"high": 1.0}],
    "thresholds.running": [{"factor": 1.0}, {"factor": 0.5}, {"decay": 1.0}],
    "thresholds.norm_ratio": [{"ratio": 1.0}, {"decay": 1.0}],
    "thresholds.previous": [{"ratio": 0.5}],
    "clippy": [{"absolute": 0.0}, {"relative": -1.0}],
    "spam_clip": [{"threshold": -1.0}, {"decay": 2.0}],
    "adamw_clip": [{"ratio": -1.0}, {"floor": "none"}],
    "scale_by_acclip": [{"b1": 1.0}, {"alpha": 0.0}],
    "clip_by_running_max": [{"decay": 1.0}],
    "normalize_by_moments": [{"b2": 1.0}, {"eps": -1.0}],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_rejected_by_name(name):
    for arguments in BAD[name]:
        (argument,) = arguments
        with pytest.raises(ValueError, match=rf"^{name}: {argument} must be .*, got "):
            operator.attrgetter(name)(optaxclip)(**arguments)
