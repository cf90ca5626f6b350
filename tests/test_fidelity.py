"""Each algorithm follows its paper, retold in NumPy, for 300 steps of warm-up, drift and spikes."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from tests import reference
from tests.cases import lingvo

STEPS = 300
SHAPE = (3, 2)


def series(seed=0):
    """Gradients of one leaf: log-normal norms that drift by a factor of 4, spikes and lulls."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(STEPS, *SHAPE)) + 0.3
    scale = np.exp(0.3 * rng.normal(size=STEPS)) * 4.0 ** (np.arange(STEPS) / STEPS)
    scale[[30, 31, 70, 150, 220]] *= [8, 20, 1000, 12, 50]
    scale[[100, 180]] *= [0.05, 1e-3]
    return (grads * scale[:, None, None]).astype(np.float32)


def followed(tx, grads, params):
    """The updates of each step."""

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1])(grads)


def lengths(grads):
    return np.linalg.norm(np.asarray(grads, np.float64).reshape(len(grads), -1), axis=1)


BY_NORM = {
    "autoclip": ({}, {"percentile": 35.0, "window": 50}),
    "zclip": ({}, {"z": 1.5, "decay": 0.9, "warmup_steps": 10}),
    "clip_by_log_zscore": ({}, {"z": 1.2, "decay": 0.8}),
    "adagc": ({}, {"ratio": 1.2, "decay": 0.9, "warmup_steps": 20, "max_norm": 3.0}),
    "quantile_clip": ({}, {"quantile": 0.9, "learning_rate": 0.05, "init": 2.0}),
    "clip_by_median": ({}, {"scale": 1.5, "window": 30, "every": 60}),
    "limit_norm_growth": ({}, {"ratio": 1.3}),
    "normalize_by_moments": ({}, {"b1": 0.85, "b2": 0.999}),
    "band_clip": ({}, {"low": 0.8, "high": 1.25, "decay": 0.9}),
}


@pytest.mark.parametrize("name", BY_NORM)
@pytest.mark.parametrize("own", [0, 1], ids=["defaults", "others"])
@pytest.mark.parametrize("seed", [0, 1])
def test_norms_follow_the_paper(name, own, seed):
    arguments, grads = BY_NORM[name][own], series(seed)
    got = followed(getattr(oc, name)(**arguments), grads, jnp.ones(SHAPE))
    want = getattr(reference, name)(lengths(grads), **arguments)
    np.testing.assert_allclose(lengths(got), want, rtol=1e-5)
    clipped = np.mean(np.asarray(want) < lengths(grads) * (1 - 1e-6))
    assert clipped > 0.005, "the series must put the method to work"


PARTS = {
    "autoclip_after": (
        lambda: oc.autoclip(95.0, 100, update_first=False, max_norm=30.0),
        {"max_norm": 30.0},
    ),
    "running": (lambda: oc.clip_by(oc.thresholds.running(2.0)), {}),
    "adagc": (
        lambda: oc.adagc(warmup_steps=0, max_norm=math.inf),
        {"warmup_steps": 1, "max_norm": np.inf},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_variants_follow_their_rule(name):
    make, arguments = PARTS[name]
    grads = series()
    want = getattr(reference, name)(lengths(grads), **arguments)
    np.testing.assert_allclose(lengths(followed(make(), grads, jnp.ones(SHAPE))), want, rtol=1e-5)


@pytest.mark.parametrize("scope", ["leaf", "tree"])
@pytest.mark.parametrize(
    "arguments", [{}, {"ratio": 1.3, "decay": 0.9}], ids=["defaults", "others"]
)
def test_norm_ratio_is_olmos_rule_by_leaf_and_for_the_whole(scope, arguments):
    grads = {"a": series(), "b": 5 * series(1)}
    raw = {name: lengths(g) for name, g in grads.items()}
    tx = oc.clip_by(oc.thresholds.norm_ratio(**arguments), scope=getattr(oc.scopes, scope))
    got = followed(tx, grads, dict.fromkeys(grads, jnp.ones(SHAPE)))
    whole = np.hypot(*raw.values())
    factor = np.asarray(reference.norm_ratio(whole, **arguments)) / whole
    for name, n in raw.items():
        want = reference.norm_ratio(n, **arguments) if scope == "leaf" else n * factor
        np.testing.assert_allclose(lengths(got[name]), want, rtol=1e-5)
        assert np.mean(np.asarray(want) < n * (1 - 1e-6)) > 0.005


BY_ELEMENT = {
    "spam_clip": ({}, {"threshold": 5.0, "decay": 0.9, "warmup_steps": 5, "every": 70}),
    "adamw_clip": ({}, {"ratio": 1.2, "decay": 0.9, "floor": 2.0, "warmup_steps": 3}),
    "clip_by_running_max": ({}, {"decay": 0.9}),
    "scale_by_acclip": ({}, {"b1": 0.5, "b2": 0.9, "alpha": 1.7}),
    "clip_by_momentum_norm": ({}, {"ratio": 4.5}),
    "u_clip": ({"max_norm": 1e6}, {"max_norm": 40.0}),
    "clip21": ({"max_norm": 1.0}, {"max_norm": 30.0}),
}


@pytest.mark.parametrize("name", BY_ELEMENT)
@pytest.mark.parametrize("own", [0, 1], ids=["defaults", "others"])
def test_elements_follow_the_paper(name, own):
    arguments, grads = BY_ELEMENT[name][own], series()
    extra = {"max_carry": np.inf} if name == "u_clip" else {}
    got = followed(getattr(oc, name)(**arguments, **extra), grads, jnp.ones(SHAPE))
    want = getattr(reference, name)(np.float64(grads), **arguments)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 * np.abs(want).max())
    assert own == 0 or np.any(np.abs(want - grads) > 1e-3)


def test_the_bounds_that_normalize_by_moments_states_are_reached_and_not_passed():
    spikes = np.array([1.0, 2.0, 3.857, 10.0, 100.0, 1e6])
    steady = np.r_["0,2", np.ones((200, len(spikes))), spikes]
    # By Cauchy-Schwarz the worst series grows by b2 / b1 per step.
    worst = np.repeat((0.9 / 0.7) ** np.arange(201.0)[:, None] * 1e-20, len(spikes), 1)
    grads = {"steady": jnp.float32(steady.T[..., None]), "worst": jnp.float32(worst.T[..., None])}
    follow = functools.partial(
        followed, oc.normalize_by_moments(), params=dict.fromkeys(grads, jnp.zeros(1))
    )
    last = jax.tree.map(lambda x: np.asarray(x[:, -1, 0]), jax.vmap(follow)(grads))
    assert round(float(last["steady"].max()), 4) == round(float(last["steady"][2]), 4) == 1.2019
    assert round(float(last["steady"][-1]), 2) == 0.95
    assert round(float(last["worst"][0]), 3) == 1.406


def test_stable_rms_follows_the_paper():
    grads = series()
    for arguments in ({}, {"b1": 0.5, "b2": 0.9}):
        adam = optax.scale_by_adam(**({"b2": 0.99} | arguments), eps=1e-6)
        tx = oc.scale_by_stable_rms(adam, arguments.get("b2", 0.99))
        want = reference.scale_by_stable_rms(np.float64(grads), **arguments)
        np.testing.assert_allclose(followed(tx, grads, jnp.ones(SHAPE)), want, rtol=1e-4, atol=1e-6)


def test_stable_adamw_and_stable_spam_are_their_parts():
    grads, params = series(), jnp.full(SHAPE, 2.0)
    got = followed(oc.stable_adamw(0.1, weight_decay=0.01), grads, params)
    adam = oc.scale_by_stable_rms(
        optax.chain(optax.scale_by_adam(b2=0.99, eps=1e-6), optax.add_decayed_weights(0.01)), 0.99
    )
    np.testing.assert_allclose(got, -0.1 * followed(adam, grads, params), rtol=1e-5)
    calm = reference.clip_by_running_max(np.float64(grads))
    norms = reference.normalize_by_moments(lengths(calm))
    unit = calm / lengths(calm)[:, None, None] * np.asarray(norms)[:, None, None]
    got = followed(oc.stable_spam(1.0, warmup_steps=0), grads, params)
    np.testing.assert_allclose(
        got, -followed(optax.scale_by_adam(), np.float32(unit), params), rtol=1e-3, atol=1e-5
    )


def test_clippy_and_larc_follow_the_paper():
    grads, params = series(), np.linspace(-1, 1, 6).reshape(SHAPE).astype(np.float32)
    for arguments in ({}, {"relative": 0.1, "absolute": 0.5}):
        want = reference.clippy(np.float64(grads), params, **arguments)
        np.testing.assert_allclose(followed(oc.clippy(**arguments), grads, params), want, rtol=1e-5)
    for arguments in ({}, {"trust_coefficient": 0.1, "weight_decay": 0.3}):
        want = reference.larc(np.float64(grads), np.float64(params), 0.05, **arguments)
        for rate in (0.05, lambda step: 0.05):
            np.testing.assert_allclose(
                followed(oc.larc(rate, **arguments), grads, params), want, rtol=1e-4, atol=1e-7
            )
    still = oc.larc(0.05, weight_decay=0.1)
    np.testing.assert_allclose(
        followed(still, grads[:1], jnp.zeros(SHAPE))[0], grads[0]
    )  # as in apex


def test_larc_with_a_group_that_does_not_decay():
    grads, params = series(), np.linspace(-1, 1, 6).reshape(SHAPE).astype(np.float32)
    groups = {"decays": oc.larc(0.05, weight_decay=0.3), "does not": oc.larc(0.05)}
    by_group = optax.partition(groups, {"w": "decays", "b": "does not"})
    mask = {"w": True, "b": False}
    by_mask = (oc.larc(0.05, weight_decay=0.3, mask=m) for m in (mask, lambda params: mask))
    for tx in (by_group, *by_mask):
        got = followed(tx, {"w": grads, "b": grads}, {"w": params, "b": params})
        for name, decay in {"w": 0.3, "b": 0.0}.items():
            want = reference.larc(np.float64(grads), np.float64(params), 0.05, weight_decay=decay)
            np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-7)


SKIPS = {
    "skip_spikes": oc.thresholds.window_zscore,
    "lingvo": lambda: lingvo(relearn_after=None),
}


@pytest.mark.parametrize("name", SKIPS)
def test_the_same_steps_are_skipped(name):
    norms = np.exp(0.2 * np.random.default_rng(0).normal(size=STEPS))
    norms[[10, 63, 90, 91, 200]] *= [5, 8, 30, 1000, 8]  # 63: the first step that OLMo judges
    tx = oc.skip_spikes(optax.identity(), SKIPS[name]())
    got = followed(tx, norms.astype(np.float32)[:, None], jnp.ones(1))[:, 0] == 0
    want = getattr(reference, name)(norms)
    assert got.tolist() == want
    assert want[63] and want[90]


RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded.json").read_text())


def test_zclip_matches_its_authors_code():
    (recorded,) = (run for name, run in RECORDED.items() if name.startswith("ZClip"))
    got = followed(oc.zclip(), series(), jnp.ones(SHAPE))
    np.testing.assert_allclose(lengths(got), recorded, rtol=2e-5)


(OLMOS,) = (runs for name, runs in RECORDED.items() if name.startswith("SkipStep"))


# The spikes detect a warm-up that is off by one step (63 is the first to be judged), and a window
# that is off by one norm: the norm of step 63 is in it up to 191.
@pytest.mark.parametrize("run", OLMOS, ids=lambda run: " ".join(run["spikes"]))
def test_skip_spikes_matches_olmos_code(run):
    norms = np.exp(0.2 * np.random.default_rng(0).normal(size=STEPS))
    norms[list(map(int, run["spikes"]))] *= list(run["spikes"].values())
    got = followed(oc.skip_spikes(optax.identity()), norms.astype(np.float32)[:, None], jnp.ones(1))
    assert np.flatnonzero(got[:, 0] == 0).tolist() == run["skipped"]
    assert np.flatnonzero(reference.skip_spikes(norms)).tolist() == run["skipped"]


def test_auto_s_follows_the_paper():
    grads = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * np.array(
        [[1e-3], [1], [10], [1e3], [2]]
    )
    got = oc.per_example.per_example_normalize(jnp.asarray(grads, jnp.float32))
    np.testing.assert_allclose(got, reference.per_example_normalize(grads), rtol=1e-5)
    split = {
        "a": jnp.asarray(grads[:, :2], jnp.float32),
        "b": jnp.asarray(grads[:, 2:], jnp.float32),
    }
    both = oc.per_example.per_example_normalize(split)
    np.testing.assert_allclose(np.r_[both["a"], both["b"]], got, rtol=1e-5)
    poisoned = jnp.asarray(np.r_[grads, [[np.nan, 1, 1, 1], [0, 0, 0, 0]]], jnp.float32)
    np.testing.assert_allclose(oc.per_example.per_example_normalize(poisoned), got, rtol=1e-6)


def test_the_parameter_scaled_median():
    """ScaledAdam's norm is that of g · rms(w)."""
    params = {"a": jnp.full(4, 10.0), "b": jnp.full(2, 0.1)}
    tx = oc.clip_by_median(scale_by_params=True)
    grads = {"a": jnp.full(4, 1.0), "b": jnp.full(2, 1.0)}
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        oc.metrics(state)["clip/grad_norm"], np.sqrt(4 * 100 + 2 * 0.01), rtol=1e-6
    )


def test_qk_clip_scales_weights_not_norms():
    rng = np.random.default_rng(0)
    query, key = (
        {"kernel": jnp.asarray(rng.normal(size=(5, 3, 2)), jnp.float32)} for _ in range(2)
    )
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)

    def logits(query, key):
        q, k = (jnp.einsum("nf,fhd->nhd", x, w["kernel"]) for w in (query, key))
        return jnp.einsum("nhd,mhd->hnm", q, k).max((1, 2))

    before = logits(query, key)
    threshold = float(jnp.sort(before)[1])
    np.testing.assert_allclose(
        logits(*oc.clip_qk(query, key, before, threshold)), np.minimum(before, threshold), rtol=1e-5
    )
    shared_query, same = oc.clip_qk(query, key, before, threshold, alpha=1.0)
    assert same is key
    np.testing.assert_allclose(logits(shared_query, key), np.minimum(before, threshold), rtol=1e-5)
    untouched, _ = oc.clip_qk(query, key, jnp.array([jnp.nan, jnp.inf, 1.0]))
    np.testing.assert_array_equal(untouched["kernel"], query["kernel"])
    with pytest.raises(ValueError, match="head_axis"):
        oc.clip_qk(query, key, before[:2])


def latent_logits(content, rotary, query, key, shared):
    """Of Kimi K2's attention: content and rotary parts; all heads share one rotary key."""
    q = np.einsum("nr,rhd->nhd", content, query)
    k = np.einsum("nr,rhd->nhd", content, key)
    logits = np.einsum("nhd,mhd->hnm", q[..., :3], k[..., :3])
    return (logits + np.einsum("nhd,md->hnm", q[..., 3:], rotary @ shared)).max((1, 2))


def test_qk_clip_for_latent_attention_leaves_the_shared_key_and_the_values():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(5, 4, 3 + 2)), rng.normal(size=(5, 4, 3 + 6))
    seen = rng.normal(size=(7, 5)), rng.normal(size=(7, 8))
    shared, most = rng.normal(size=(8, 2)), 40.0
    before = latent_logits(*seen, query, key, shared)
    assert (before > most).any() and (before < most).any()
    # The paper scales q and k of the content by √γ each and the rotary q by γ, and nothing else.
    gamma = np.minimum(1, most / before)[:, None]
    want = np.concatenate([query[..., :3] * gamma**0.5, query[..., 3:] * gamma], -1)
    given = [jnp.asarray(x, jnp.float32) for x in (query, key, before)]
    got, clipped = oc.clip_qk(*given, most, content_size=3)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(clipped[..., :3], key[..., :3] * gamma**0.5, rtol=1e-5)
    np.testing.assert_array_equal(clipped[..., 3:], given[1][..., 3:])
    after = latent_logits(*seen, np.float64(got), np.float64(clipped), shared)
    np.testing.assert_allclose(after, np.minimum(before, most), rtol=1e-5)
    with pytest.raises(ValueError, match="content_size must be a whole number from 1 to 5"):
        oc.clip_qk(*given, most, content_size=6)
