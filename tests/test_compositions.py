"""The clips inside published optimizers, as compositions of parts, against NumPy oracles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import actions, norms, scopes, thresholds, wrappers
from optaxclip.wrappers import clip_params

RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3) * 0.1, "new": np.zeros(2)}
GRADS = {name: RNG.normal(size=(6, *w.shape)) for name, w in PARAMS.items()}


def followed(tx, params=PARAMS, grads=GRADS):
    """The parameters after each step."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params, grads = jax.tree.map(jnp.float32, (params, grads))
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it
        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), grads)[1])()


def adams(g, state, b1=0.9, b2=0.999, eps=1e-6):
    """Adam's direction, and its new state."""
    m, v, t = state
    m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1
    return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps), (m, v, t)


def lambs(phi, rate=0.1, decay=0.01):
    """You et al. 2020: Adam's direction, rescaled to φ of the layer's norm."""

    def leaf(w, grads):
        state = (0 * w, 0 * w, 0)
        for g in grads:
            step, state = adams(g, state)
            step = step + decay * w
            ratio = phi(np.linalg.norm(w), np.linalg.norm(step))
            w = w - rate * ratio * step
            yield w

    return {name: np.array(list(leaf(w, GRADS[name]))) for name, w in PARAMS.items()}


def lamb(clip):
    return optax.chain(
        optax.scale_by_adam(eps=1e-6),
        optax.add_decayed_weights(0.01),
        clip,
        optax.scale_by_learning_rate(0.1),
    )


def test_lambs_trust_ratio_is_a_normalisation_to_a_share_of_the_parameters():
    low, high = 0.5, 2.0
    share = thresholds.at_most(thresholds.param_relative(1.0, low), high)
    got = followed(lamb(oc.clip_by(share, scope=scopes.leaf, action=actions.normalize)))
    chex.assert_trees_all_close(got, lambs(lambda w, u: np.clip(w, low, high) / u), rtol=1e-4)


def test_lambs_clipped_trust_ratio_is_a_clip_to_the_norm_of_the_parameters():
    """LAMBC, Fong et al. 2020, which is timm's `trust_clip`. Zero parameters are not clipped."""
    got = followed(lamb(oc.clip_by(thresholds.param_relative(1.0, None), scope=scopes.leaf)))
    want = lambs(lambda w, u: min(1, w / u) if w else 1)
    chex.assert_trees_all_close(got, want, rtol=1e-4)


def test_adafactor_with_its_relative_step():
    """Shazeer and Stern 2018, algorithm 4, for leaves that are not factored."""

    def leaf(w, grads):
        rms, v = (lambda x: np.sqrt(np.mean(x**2))), 0 * w
        for t, g in enumerate(grads, 1):
            decay = 1 - t**-0.8
            v = decay * v + (1 - decay) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
            u = u / max(1, rms(u) / 1.0)
            w = w - max(1e-3, rms(w)) * min(1e-2, 1 / np.sqrt(t)) * u
            yield w

    tx = optax.chain(
        optax.scale_by_factored_rms(),
        oc.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale_by_learning_rate(lambda t: jnp.minimum(1e-2, 1 / jnp.sqrt(t + 1.0))),
    )
    spikes = np.array([1, 1, 9, 1, 5, 1])
    grads = {name: (g.T * spikes).T for name, g in GRADS.items()}
    want = {name: np.array(list(leaf(w, grads[name]))) for name, w in PARAMS.items()}
    chex.assert_trees_all_close(followed(tx, grads=grads), want, rtol=1e-4, atol=1e-7)


def test_mucon_clips_the_momentum_of_muon():
    """Yi 2026: singular values of the Nesterov momentum above 1 become 1."""

    def leaf(w, grads):
        m = 0 * w
        for g in grads:
            m = 0.95 * m + g
            w = w - 0.02 * project_singular_values(0.95 * m + g, 1.0)
            yield w

    params, grads = PARAMS["kernel"], GRADS["kernel"]
    momentum = optax.trace(0.95, nesterov=True)
    tx = optax.chain(momentum, oc.spectral_clip(1.0), optax.scale_by_learning_rate(0.02))
    np.testing.assert_allclose(followed(tx, params, grads), list(leaf(params, grads)), atol=1e-4)


def test_clipped_scion_of_one_matrix_is_muons_steepest_descent_with_a_bound():
    """Pethick et al. 2025: the polar factor of a running mean, times min(ρ, its nuclear norm)."""

    def leaf(w, grads):
        m = 0 * w
        for t, g in enumerate(grads, 1):
            m = 0.9 * m + 0.1 * g
            u, s, v = np.linalg.svd(m / (1 - 0.9**t), full_matrices=False)
            w = w - 0.1 * min(2.0, s.sum()) * u @ v
            yield w

    scale = np.array([1, 1, 0.1, 0.1, 0.01, 0.01])[:, None, None]  # the bound acts, and then not
    params, grads = PARAMS["kernel"], GRADS["kernel"] * scale
    # These coefficients converge; those of Muon leave singular values between 0.7 and 1.2.
    newton = optax.contrib.scale_by_muon(
        (1.875, -1.25, 0.375), 20, 0.9, nesterov=False, adaptive=True
    )
    tx = optax.chain(newton, oc.spectral_clip(2.0), optax.scale_by_learning_rate(0.1))
    # Without LLVM's optimizations, as tests compile, the XLA of JAX 0.7 is off by 1% where the clip
    # changes nothing, if Muon is in the same program. Compiled as users do, it is not.
    atol = 1e-5 if jax.__version_info__ >= (0, 10) else 5e-3
    np.testing.assert_allclose(followed(tx, params, grads), list(leaf(params, grads)), atol=atol)


def shared(bound, params):
    """Of updates that are a multiple of a polar factor: one multiple for all, at most the bound."""
    roots = np.sqrt([min(p.shape) for p in jax.tree.leaves(params)]).astype(np.float32)
    return optax.stateless(lambda norms, _: roots * jnp.minimum(bound, (norms / roots).sum()))


def test_clipped_scion_of_several_matrices_shares_one_step():
    """Pethick et al. 2025, with the largest spectral norm: min(ρ, Σ nuclear norms) for all."""
    params = {"a": RNG.normal(size=(4, 3)), "b": RNG.normal(size=(2, 5))}
    scale = np.array([1, 0.1, 0.01, 0.01])[:, None, None]  # the bound acts, and then not
    grads = {name: scale * RNG.normal(size=(4, *w.shape)) for name, w in params.items()}
    means, want = {name: 0 * w for name, w in params.items()}, []
    w = dict(params)
    for t in range(4):
        means = {name: 0.5 * m + 0.5 * grads[name][t] for name, m in means.items()}
        factors = {name: np.linalg.svd(m, full_matrices=False) for name, m in means.items()}
        step = min(2.0, sum(s.sum() for _, s, _ in factors.values()) / (1 - 0.5 ** (t + 1)))
        w = {name: w[name] - 0.1 * step * u @ v for name, (u, _, v) in factors.items()}
        want.append(w)
    axes = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)
    newton = optax.contrib.scale_by_muon(
        (1.875, -1.25, 0.375),
        20,
        0.5,
        nesterov=False,
        adaptive=True,
        weight_dimension_numbers=axes,
    )
    clip = oc.clip_by(shared(2.0, params), scope=scopes.leaf, action=actions.normalize)
    got = followed(optax.chain(newton, clip, optax.scale_by_learning_rate(0.1)), params, grads)
    for name in params:
        np.testing.assert_allclose(got[name], [w[name] for w in want], atol=1e-4)


def test_a_spectral_bound_follows_the_largest_singular_values():
    """Yukhimchuk et al. 2026: the bound is a quantile over a window of them."""

    def leaf(grads):
        largest = [np.linalg.norm(g, 2) for g in grads]
        for t, g in enumerate(grads):
            bound = np.percentile(largest[max(0, t - 3) : t + 1], 60)
            yield project_singular_values(g, bound)

    grads = GRADS["kernel"] * np.array([1, 3, 1, 9, 1, 2])[:, None, None]
    tx = optax.chain(oc.spectral_clip(thresholds.percentile(60.0, window=4)), optax.scale(-1.0))
    steps = -np.diff(followed(tx, 0 * grads[0], grads), axis=0, prepend=0 * grads[:1])
    np.testing.assert_allclose(steps, list(leaf(grads)), atol=2e-2)


def test_spectra_clips_the_updates_of_adam_and_holds_its_product_with_the_rate():
    """Jiang et al. 2026, with a warm-up of 3 steps; kernels are (in, out)."""
    rates = np.array([0.0, 0.1, 0.2, 0.3, 0.25, 0.2])

    def soft(u, c):
        p, s, q = np.linalg.svd(u, full_matrices=False)
        return p * (s / np.sqrt(1 + (s / c) ** 2)) @ q

    def leaf(w, grads):
        state, (m, n) = (0 * w, 0 * w, 0), w.shape if w.ndim > 1 else (len(w), 1)
        for t, g in enumerate(grads):
            c = 0.7 * (rates[3] / max(rates[t], 1e-10) if t < 3 else 1)
            step, state = adams(g, state, eps=1e-8)
            clipped = soft(step.reshape(m, n), c).reshape(w.shape)
            w = (1 - 0.1 * rates[t]) * w - np.sqrt(max(1, n / m)) * rates[t] * clipped
            yield w

    shapes = {"wide": (3, 5), "tall": (4, 2), "bias": (3,), "layers": (2, 3, 5)}
    params = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    grads = {name: RNG.normal(size=(6, *w.shape)) for name, w in params.items()}

    def rate(step):
        return jnp.asarray(rates, jnp.float32)[step]

    tx = wrappers.spectra(optax.scale_by_adam(), rate, 0.7, warmup_steps=3, stacked="layers")
    layers = [list(leaf(w, grads["layers"][:, i])) for i, w in enumerate(params["layers"])]
    want = {
        name: np.array(list(leaf(params[name], grads[name]))) for name in ("wide", "tall", "bias")
    }
    want["layers"] = np.stack(layers, axis=1)
    chex.assert_trees_all_close(followed(tx, params, grads), want, atol=1e-4)
    for bad in (thresholds.running(2.0), {"wide": 1.0}):
        with pytest.raises(ValueError, match="max_singular_value must be a number or a schedule"):
            wrappers.spectra(optax.identity(), rate, bad, warmup_steps=3)
    with pytest.raises(ValueError, match="learning_rate must be a schedule if"):
        wrappers.spectra(optax.identity(), 0.1, warmup_steps=3)


def test_a_cap_on_the_step_as_a_share_of_the_layer():
    tx = optax.chain(optax.sgd(1.0), oc.clip_by(thresholds.param_relative(0.1), scope=scopes.leaf))
    params = jnp.array([0.0, 2.0])
    updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
    np.testing.assert_allclose(updates, [-0.12, -0.16], rtol=1e-6)


def project_units(w, most):
    """Keras's MaxNorm: the norm of each column is at most `most`."""
    return w * np.minimum(1, most / np.linalg.norm(w, axis=0))


def project_singular_values(w, most):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return u * np.minimum(s, most) @ v


PROJECTIONS = {
    "leaf": (oc.clip_by_leaf_norm(1.5), lambda w: w * min(1, 1.5 / np.linalg.norm(w))),
    "units": (oc.clip_by(0.8, scope=scopes.units()), lambda w: project_units(w, 0.8)),
    "rms": (
        oc.clip_by(0.4, norm=norms.rms, scope=scopes.leaf),
        lambda w: w * min(1, 0.4 / np.sqrt(np.mean(w**2))),
    ),
    "spectral": (oc.spectral_clip(1.0), lambda w: project_singular_values(w, 1.0)),
    "Optax's": (optax.clip(0.3), lambda w: np.clip(w, -0.3, 0.3)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_parameters_stay_within_their_bound(name):
    clip, project = PROJECTIONS[name]

    def leaf(w, grads):
        for g in grads:
            w = project(w - 0.3 * g)
            yield w

    params, grads = PARAMS["kernel"], GRADS["kernel"]
    got = followed(optax.chain(optax.sgd(0.3), clip_params(clip)), params, grads)
    np.testing.assert_allclose(got, list(leaf(params, grads)), atol=1e-4)


def test_within_their_bound_parameters_get_the_update_bit_for_bit():
    tx = clip_params(oc.clip_by_leaf_norm({"a": 1e9, "b": 1.0}))
    params = {"a": jnp.full(3, 1e8), "b": jnp.array([0.8, 0.6])}
    updates = {"a": jnp.full(3, 1e-3, jnp.bfloat16), "b": jnp.array([0.8, 0.6], jnp.bfloat16)}
    got, state = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(got, updates)
    np.testing.assert_array_equal(got["a"], updates["a"])
    np.testing.assert_allclose(np.float32(got["b"]), 0, atol=3e-3)
    assert float(oc.metrics(state)["clip/clipped_fraction/b"]) == 1


def test_updates_and_parameters_may_differ_in_width():
    with jax.enable_x64(True):
        for step, own in ((jnp.float32, jnp.float64), (jnp.float64, jnp.bfloat16)):
            tx, params = clip_params(oc.clip_by_leaf_norm(5.0)), jnp.array([3.0, 4.0], own)
            updates, _ = tx.update(jnp.array([3.0, 4.0], step), tx.init(params), params)
            assert updates.dtype == step
            np.testing.assert_allclose(updates, 0, atol=1e-6)


def test_a_clip_of_parameters_asks_for_parameters_and_passes_check():
    tx, params = clip_params(oc.clip_by_leaf_norm(1.0)), {"w": jnp.ones((2, 2))}
    assert not oc.check(optax.chain(optax.adamw(1e-3), tx), params)
    with pytest.raises(ValueError, match=r"clip_params: .*tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="clip must be a transformation"):
        clip_params(1.0)
    with pytest.raises(ValueError, match="would set parameters to zero"):
        clip_params(oc.clip_by_leaf_norm(1.0, nonfinite="zero"))
