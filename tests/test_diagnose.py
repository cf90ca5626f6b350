"""The signs in a recorded run: each planted one is found; healthy runs have none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.monitoring.history import read_run

RNG = np.random.default_rng(0)
N = 200
NOISE = np.exp(0.3 * RNG.normal(size=N))
FALLING = 3.0 * 0.99 ** np.arange(N) + 0.05 * RNG.normal(size=N)
LAYERS = [f"watch/grad_norm/layers/{i}/{part}" for i in range(12) for part in ("kernel", "bias")]


def names(history, **more):
    return [sign.name for sign in oc.diagnose(history, **more)]


def norms(x):
    return {"watch/grad_norm": np.asarray(x)}


def by_depth(ratio):
    """Norms of twelve layers, each `ratio` times the next one's, in no particular order."""
    table = {key: ratio ** (11 - int(key.split("/")[3])) * NOISE for key in sorted(LAYERS)}
    return table | norms(NOISE)


def clip(clipped, norm, bound=1.0):
    size = len(np.atleast_1d(clipped))
    full = [np.broadcast_to(x, size) for x in (clipped, norm, bound)]
    return dict(zip(("clip/clipped", "clip/grad_norm", "clip/bound"), full, strict=True))


def spikes():
    x = NOISE.copy()
    x[[20, 60, 100, 140, 180]] *= 40
    return x


PLANTED = {
    "norms-exploding": (norms(NOISE * 1.05 ** np.arange(N)), {}),
    "norms-exploding at the end": (norms(np.r_[NOISE[:180], 1.5 ** np.arange(20)]), {}),
    "norms-exploding into NaN": (norms(np.r_[NOISE[:180], 1.9 ** np.arange(12), [np.nan] * 8]), {}),
    "norms-vanishing": (norms(NOISE * 0.95 ** np.arange(N)), {"losses": np.ones(N)}),
    "norms-vanishing loss unknown": (norms(NOISE * 0.9 ** np.arange(N)), {}),
    "norm-not-finite": (norms(np.where(np.arange(N) == 7, np.inf, NOISE)), {}),
    "loss-not-finite": (norms(NOISE), {"losses": np.where(np.arange(N) == 7, np.nan, FALLING)}),
    "loss-not-moving": (norms(NOISE), {"losses": 2.3 + 0.01 * RNG.normal(size=N)}),
    "loss-not-moving at all": (norms(NOISE), {"losses": np.full(N, 2.3)}),
    "loss-rising": (norms(NOISE), {"losses": FALLING[::-1]}),
    "weights-growing": (norms(NOISE), {"param_norms": 10 * 1.02 ** np.arange(N)}),
    "norms-fall-with-depth": (by_depth(1 / 3), {}),
    "norms-grow-with-depth": (by_depth(2.0), {}),
    "clip-always-active": (clip(np.ones(N), 9 * NOISE), {}),
    "clip-never-active": (clip(np.zeros(N), 0.01 * NOISE), {}),
    "heavy-tail": (norms(spikes()), {}),
}


# What comes with it, and is as true.
ALONG = {"norms-exploding at the end": ["heavy-tail"], "norms-vanishing": ["loss-not-moving"]}


@pytest.mark.parametrize("case", PLANTED)
def test_the_planted_sign_is_found(case):
    history, more = PLANTED[case]
    found = oc.diagnose(history, **more)
    assert case.split()[0] in [sign.name for sign in found]
    if "NaN" not in case:
        assert {sign.name for sign in found} <= {case.split()[0], *ALONG.get(case, ())}, [
            str(sign) for sign in found
        ]
    for sign in found:
        assert sign.evidence and all(np.isfinite(x) for x in sign.evidence.values())
        assert sign.name in str(sign) and sign.fix in str(sign)


HEALTHY = {
    "noise": (norms(NOISE), {"losses": FALLING, "param_norms": 10 + 0.01 * np.arange(N)}),
    "convergence": (norms(NOISE * 0.95 ** np.arange(N)), {"losses": FALLING}),
    "warm-up": (norms(NOISE * np.linspace(0.3, 1, N)), {"losses": FALLING}),
    "layers": (by_depth(1.2), {}),
    "clip": (clip(NOISE > 1.3, NOISE, 1.3), {}),
    "clip in reserve": (clip(np.zeros(N), 0.3 * NOISE / NOISE.max()), {}),
    "no bound": (clip(np.zeros(N), NOISE, np.inf), {}),
    "one spike": (norms(np.where(np.arange(N) == 50, 8.0, NOISE)), {"losses": FALLING}),
    "a step up": (norms(NOISE * np.where(np.arange(N) > 100, 5, 1)), {"losses": FALLING}),
    "log-normal": (norms(np.exp(0.7 * np.random.default_rng(1).normal(size=2000))), {}),
    "short": (norms(NOISE[:5]), {"losses": FALLING[:5]}),
    "zeros": (norms(np.zeros(N)), {}),
    "empty": (norms([]), {"losses": []}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_is_not_spoken_of(case):
    history, more = HEALTHY[case]
    assert not [str(sign) for sign in oc.diagnose(history, **more)]


def test_depth_counts_as_people_do_and_gives_the_numbers():
    (sign,) = oc.diagnose(by_depth(1 / 3))
    assert "from layers/11 back to layers/0" in sign.what and sign.evidence["layers"] == 12
    np.testing.assert_allclose(sign.evidence["per_layer"], 3, rtol=1e-6)
    (sign,) = oc.diagnose(norms(1.1 ** np.arange(N)))
    np.testing.assert_allclose(sign.evidence["doubling_steps"], np.log(2) / np.log(1.1), rtol=1e-6)


def test_forms_of_a_history():
    history = oc.History(window=150)
    for i in range(N):
        history.append(
            {"watch/grad_norm": jnp.float32(1.1**i), "clip/grad_norm": 1.0},
            loss=FALLING[i],
            param_norm=1.0,
        )
    assert len(history) == 150 and history.rows()[0]["loss"] == FALLING[50]
    assert names(history) == ["norms-exploding"] == names(history.rows()) == names(history.arrays())
    late = [{"grad_norm": 1.0}, {"grad_norm": 1.0, "loss": 2.0}]
    assert np.isnan(read_run(late).losses[0])
    with pytest.raises(ValueError, match="no key 'grad_norm'"):
        oc.diagnose({"loss": FALLING})


def test_a_history_takes_scalars_only():
    history, state = oc.History(), oc.clip_by_leaf_norm(1.0).init({"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"history\.append\(optaxclip\.metrics\(opt_state\).* Got ClipState"
    ):
        history.append(state)
    with pytest.raises(
        ValueError, match=r"one number under each key; not so \{'clip/grad_norm': \(2,\)\}"
    ):
        history.append({"clip/grad_norm": jnp.ones(2)})
    for window in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="History: window must be"):
            oc.History(window)
    assert len(history) == 0


def test_a_clip_that_does_not_measure_is_not_judged():
    run = norms(NOISE) | {"clip/bound": np.ones(N), "clip/steps": np.arange(N)}
    assert names(run) == [] and read_run(run).clips == {}


def trained(rate, depth=3, unit=jnp.tanh, steps=150, bound=1.0):
    """Trains a chain of layers; what was seen at each step."""
    rng = np.random.default_rng(0)
    params = {
        f"dense_{i}": jnp.asarray(rng.normal(size=(8, 8)) / 8**0.5, jnp.float32)
        for i in range(depth)
    }
    x, y = (jnp.asarray(rng.normal(size=(32, 8)), jnp.float32) for _ in range(2))
    tx = optax.chain(oc.watch(), oc.clip_by_global_norm(bound), optax.sgd(rate))

    def loss_of(params):
        h = x
        for i in range(depth):
            h = unit(h @ params[f"dense_{i}"])
        return jnp.mean(jnp.square(h - 0.5 * jnp.tanh(y)))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        now = oc.metrics(state) | {"loss": loss, "param_norm": optax.tree.norm(params)}
        return (optax.apply_updates(params, updates), state), now

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1])()


def test_real_trainings():
    assert names(trained(0.3)) == []
    assert "norms-fall-with-depth" in names(trained(0.3, depth=12, unit=jax.nn.sigmoid, steps=60))
    assert "clip-always-active" in names(trained(0.1, bound=0.01))
