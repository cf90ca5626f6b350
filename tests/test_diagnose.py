"""The signs in a recorded run: each planted one is found, and healthy runs have none."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.monitoring import fits
from optaxclip.monitoring.recorded import read_run
from tests.catalogue import CASES, SILENT, windows_of
from tests.catalogue import HEALTHY as RUNS_WELL

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
    "norm-not-finite": (norms(np.where(np.arange(N) == 7, np.nan, NOISE)), {}),
    "norm-overflow": (norms(np.where(np.arange(N) == 7, np.inf, NOISE)), {}),
    "zero-gradients": (norms(np.zeros(N)), {}),
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


# Signs that come with another one, and are true as well.
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


@pytest.mark.parametrize("end", [np.nan, np.inf, None], ids=str)
@pytest.mark.parametrize("fold", [4.0, 30.0, 1000.0])
def test_a_steep_explosion_began_at_its_first_step(fold, end):
    """A step before the rise would be looked at in vain, and one after it is a consequence."""
    for before in (40, 100):
        x = (
            NOISE[:150] ** 0.3
            * np.r_[np.ones(before), fold ** np.arange(1, 6), np.ones(145 - before)]
        )
        x[before + 5 :] *= fold**5 if end is None else end
        assert oc.diagnose(norms(x))[0].step == before + 1


@pytest.mark.parametrize("large", [slice(0, 1), slice(0, 3), slice(50, 51)], ids=str)
def test_a_jump_is_found_behind_single_steps_as_large_as_the_new_level(large):
    """First steps are large in many runs."""
    x = NOISE[:N] ** 0.5
    x[120:] *= 100
    x[large] *= 300
    (sign,) = oc.diagnose(norms(x))
    assert (sign.name, sign.step) == ("norms-jumped", 121)
    assert 50 < sign.evidence["growth"] < 200


def run_clip(steps, *, keep=True, old=False, wrap=lambda tx: tx, every=1):
    """What a user records who keeps the state, or drops it, or reads one that is out of date."""
    tx = wrap(oc.clip_by_global_norm(100.0))
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    history = oc.History(every=every)
    for norm in NOISE[:steps]:
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            _, new = update(jnp.float32([norm, 0.0]), state)
        history.append(oc.metrics(state if old else new))
        state = new if keep else state
    return history


def accumulate(tx, every=8):
    return optax.MultiSteps(tx, every).gradient_transformation()


DROPPED = {
    "the new one recorded": ({"keep": False}, 1),
    "the old one recorded": ({"keep": False, "old": True}, 0),
    "inside a wrapper": ({"keep": False, "wrap": oc.skip_spikes}, 1),
    "accumulated": ({"keep": False, "wrap": accumulate}, 0),
    "reported now and then": ({"keep": False, "every": 4}, 1),
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_state_that_is_not_kept_is_all_that_is_said(case):
    how, count = DROPPED[case]
    (sign,) = oc.diagnose(run_clip(120, **how))
    assert sign.name == "state-not-kept" and sign.evidence["count"] == count
    assert f"clip/steps is {count} at each of" in sign.what


KEPT = {
    "kept": {"steps": 60},
    "too few to tell": {"steps": 15, "keep": False},
    "accumulated": {"steps": 60, "wrap": accumulate},
    "each tenth": {"steps": 200, "every": 10},
    "all skipped": {"steps": 60, "wrap": lambda tx: oc.skip_spikes(tx, 1e-3)},
}


@pytest.mark.parametrize("case", KEPT)
def test_a_state_that_is_kept_is_no_sign(case):
    assert "state-not-kept" not in names(run_clip(**KEPT[case]))


def test_counters_may_stand_still_for_a_reason():
    still = norms(NOISE[:60]) | {"watch/steps": np.full(60, 3.0)}
    assert names(still) == ["state-not-kept"]
    assert names(still | {"run": np.arange(60)}) == []  # runs side by side, in one report each
    assert names(still | norms(np.ones(60))) == []  # within one accumulation
    assert "state-not-kept" not in names(still, losses=np.full(60, np.nan))  # all rejected


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
    "zeros now and then": (norms(NOISE * (np.arange(N) % 4 == 3)), {}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_is_not_spoken_of(case):
    history, more = HEALTHY[case]
    assert not [str(sign) for sign in oc.diagnose(history, **more)]


def test_depth_counts_as_people_do_and_gives_the_numbers():
    (sign,) = oc.diagnose(by_depth(1 / 3))
    assert "from layers/11 back to layers/0" in sign.what and sign.evidence["layers"] == 12
    np.testing.assert_allclose(sign.evidence["per_layer"], 3, rtol=1e-6)
    stacked = {re.sub(r"/(\d+)/(\w+)", r"/\2[\1]", k): x for k, x in by_depth(1 / 3).items()}
    (sign,) = oc.diagnose(stacked)
    assert "from layers[11] back to layers[0]" in sign.what and sign.evidence["layers"] == 12
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
    assert np.isnan(read_run(late).losses[0]) and not len(read_run(late).param_norms)
    with pytest.raises(ValueError, match="no 'grad_norm' in the history"):
        oc.diagnose({"loss": FALLING})


def test_a_history_takes_scalars_only():
    history, state = oc.History(), oc.clip_by_leaf_norm(1.0).init({"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"history\.append\(optaxclip\.metrics\(opt_state\).* Got ClipState"
    ):
        history.append(state)
    with pytest.raises(
        ValueError, match=r"not these shapes or types: \{'clip/grad_norm': \(2,\)\}"
    ):
        history.append({"clip/grad_norm": jnp.ones(2)})
    for window in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="History: window must be"):
            oc.History(window)
    assert len(history) == 0
    with pytest.raises(ValueError, match=r"not these shapes or types: \{'phase': 'str'\}"):
        oc.History().append({"phase": "warm", "loss": 1.0})


def test_a_clip_that_does_not_measure_is_not_judged():
    run = norms(NOISE) | {"clip/bound": np.ones(N), "clip/steps": np.arange(N)}
    assert names(run) == [] and read_run(run).measuring_clips() == {}


SEEDS = 8


@pytest.mark.parametrize("case", CASES)
def test_the_catalogue(case):
    """The rates over many seeds are in the docs; these few are all right."""
    expected = CASES[case]
    for seed in range(SEEDS):
        run = expected.draw(np.random.default_rng(seed))
        found = oc.diagnose(run)
        first = found[0].name if found else SILENT
        assert first == expected.first, f"seed {seed}: {found}"
        assert not expected.never & {sign.name for sign in found}, f"seed {seed}: {found}"
        if expected.block:
            assert found[0].block == "layers/3", f"seed {seed}: {found}"


@pytest.mark.parametrize("seed", [29, 60, 65, 85, 132])
def test_a_slow_rise_to_a_level_is_found_with_the_block_that_was_first(seed):
    """Most of it lies before the step that best splits the run, or it ends shortly before."""
    found = oc.diagnose(CASES["explosion, 200 steps, plateau"].draw(np.random.default_rng(seed)))
    assert (found[0].name, found[0].block) == ("norms-exploding", "layers/3")


@pytest.mark.parametrize("case", RUNS_WELL)
def test_a_window_of_a_healthy_run_is_not_spoken_of(case):
    """Wherever it is cut out; the rates over many seeds are in the docs."""
    for seed in range(2):
        for window in windows_of(RUNS_WELL[case](np.random.default_rng(seed))):
            assert names(window) == [], f"seed {seed}, step {window['watch/steps'][0]}"


def test_a_record_that_begins_late_does_not_tell_whether_the_loss_ever_moved():
    run = norms(NOISE) | {"loss": 2.3 + 0.01 * RNG.normal(size=N)}
    steps = np.arange(1.0, N + 1)
    for stuck in (run, run | {"step": steps + 2}, run | {"step": 100 * steps}):
        assert names(stuck) == ["loss-not-moving"]
    # A loss may have converged within ten steps.
    for late in (10, 500):
        assert names(run | {"step": steps + late}) == []
    still = run | {"param_norm": np.ones(N)}
    assert names(still) == ["learning-rate-too-low"] and names(still | {"step": steps + 500}) == []
    fading = norms(NOISE * 0.95 ** np.arange(N)) | {"loss": np.ones(N)}
    assert "norms-vanishing" in names(fading) and names(fading | {"step": steps + 500}) == []
    # The norms are there from the first step on, but the losses are not.
    assert names(run | {"loss": np.where(steps > 100, run["loss"], fits.MISSING)}) == []


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_loss_that_fell_within_the_first_rows_has_converged(rows, noise):
    loss = (0.5 + 2.0 * (np.arange(N) < rows)) * (
        1 + noise * np.random.default_rng(rows).normal(size=N)
    )
    assert names(norms(NOISE) | {"loss": loss}) == []
    still = {"param_norm": np.ones(N)}  # a small change of large weights
    assert names(norms(NOISE) | {"loss": loss} | still) == []
    vanishing = norms(0.95 ** np.arange(N)) | {"loss": loss}
    assert names(vanishing) == []
    # What fell is gone, so that the rest is that of a run that is stuck.
    rest = {key: x[rows:] for key, x in vanishing.items()}
    assert "norms-vanishing" in names(rest)


def test_norms_that_fade_are_not_said_to_leave_a_loss_that_nobody_recorded():
    fading = norms(0.9 ** np.arange(N))
    (alone,) = oc.diagnose(fading)
    assert "the loss does not" not in alone.what and "Record loss=" in alone.fix
    (judged, *_) = oc.diagnose(fading | {"loss": np.ones(N)})
    assert "the loss does not" in judged.what and "Record loss=" not in judged.fix


def test_of_skipped_steps_the_block_is_named_that_was_first():
    bad, x = np.arange(60) >= 33, NOISE[:60]
    lost = np.where(bad, np.nan, x)
    table = norms(lost) | {"watch/grad_norm/a": x, "watch/grad_norm/b": lost}
    counts = {"consecutive": np.cumsum(bad), "last_reason": 3 * bad, "grad_norm": lost}
    (sign,) = oc.diagnose(table | {f"skip/{key}": x for key, x in counts.items()})
    assert (sign.name, sign.step, sign.block) == ("every-step-skipped", 34, "b")
    assert "not finite, first in b" in sign.what


def test_a_sign_says_where_it_began_and_how_large_it_is():
    x = np.r_[NOISE[:180], 1.9 ** np.arange(1, 13), [np.nan] * 8]
    (sign,) = oc.diagnose(norms(x) | {"watch/steps": np.arange(1001, 1001 + N)})
    assert 1180 <= sign.step <= 1185 and sign.evidence["growth"] > 1000
    assert "not finite at step 1193" in sign.what and "zclip" in sign.fix
    x = np.where(np.arange(N) == 70, 500.0, NOISE)
    (sign,) = oc.diagnose(norms(x))
    assert (sign.name, sign.step) == ("spike", 71) and sign.evidence["largest"] > 300
    assert "afterwards it is as before" in sign.what
    (sign,) = oc.diagnose(norms(x[:71]))
    assert sign.name == "spike" and "the record ends there" in sign.what


@pytest.mark.parametrize("prefix", ["", "opt/", "a/b/"])
def test_any_prefix(prefix):
    """What `metrics` writes under prefixes of the user's is the same run."""
    run = CASES["bound too low"].draw(np.random.default_rng(0))
    renamed = {key.replace("clip/", prefix, 1): x for key, x in run.items()}
    if not prefix:
        del renamed["grad_norm"], renamed["bound"], renamed["clipped"]
        renamed |= {key: run[f"clip/{key}"] for key in ("grad_norm", "bound", "clipped")}
    assert names(renamed) == ["clip-always-active"]
    explosion = CASES["explosion, 5 steps, nan"].draw(np.random.default_rng(0))
    watch = {k.replace("watch/", prefix): x for k, x in explosion.items() if "watch" in k}
    (sign,) = oc.diagnose(watch)
    assert (sign.name, sign.block) == ("norms-exploding", "layers/3")


def test_the_history_of_one_clip_or_watch_under_any_prefix():
    watch = {"mine/grad_norm": [1.0], "mine/median_ratio": [1.0], "mine/grad_norm/a": [1.0]}
    first, second = {"x/0/grad_norm": [2.0], "x/0/bound": [5.0]}, {"x/1/grad_norm": [3.0]}
    history = watch | first | second | {"loss": [0.5]}
    assert read_run(history, 1).norms == [3.0] and read_run(history, 0).norms == [2.0]
    assert read_run(history).norms == [1.0] and read_run(history, 7).clip == {}
    assert read_run(history, 0).clip["bound"] == [5.0]
    assert read_run(history, 1).blocks == {"a": [1.0]}
    alone = read_run(watch | {"loss": [0.5]}, 0)
    assert alone.norms == [1.0] and alone.clips == {} and alone.losses == [0.5]
    beside = read_run({"watch/grad_norm": [1.0], "clip/grad_norm": [2.0]}, 0)
    assert beside.norms == [2.0] and beside.watches == {"watch/": {"grad_norm": [1.0]}}


def test_rows_on_the_device_are_fetched_as_one_array_a_step(monkeypatch):
    """Each array that is fetched has its price, and a run has 100 scalars a step."""
    step = jax.jit(lambda x: {"clip/grad_norm": x} | {f"layers/{i}": x for i in range(50)})
    rows, fetched = [step(jnp.float32(i)) for i in range(5)], []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.extend(jax.tree.leaves(x)) or get(x))
    run = read_run(rows)
    np.testing.assert_array_equal(run.table["layers/49"], np.arange(5.0))
    assert len(fetched) == len(rows)


def test_a_history_is_bounded_and_keeps_what_stands_out():
    history, steps = oc.History(max_steps=100), 3000
    for i in range(steps):
        norm = jnp.float32(1e4) if i == 1234 else np.nan if 700 <= i < 720 else 1.0 + i % 2
        history.append({"watch/grad_norm": norm, "watch/nonfinite_steps": i})
    norms = history.arrays()["watch/grad_norm"]
    assert 50 <= len(history) <= 100 and list(history.steps) == sorted(set(history.steps))
    assert history.steps[norms == 1e4] == [1235] and np.isnan(norms).any()
    # Apart from the steps that stand out, the run is covered evenly.
    assert np.diff(history.steps).max() <= 64
    window = oc.History(window=100)
    for i in range(steps):
        window.append({"loss": float(i)})
    np.testing.assert_array_equal(window.arrays()["loss"], np.arange(steps - 100, steps))


def test_a_history_takes_each_so_many_steps_and_keys_that_come_later():
    history = oc.History(every=3)
    for i in range(600):
        more = {} if i % 2 else {"extra": jnp.int32(i)}
        history.append({"loss": jnp.float32(i)} | more)
    seen = history.arrays()
    np.testing.assert_array_equal(seen["loss"], np.arange(0, 600, 3))
    np.testing.assert_array_equal(history.steps, np.arange(1, 601, 3))
    np.testing.assert_array_equal(seen["extra"][::2], np.arange(0, 600, 6))
    assert np.isnan(seen["extra"][1::2]).all()


def test_a_history_outlives_the_donation_of_what_it_was_given():
    """What `metrics` returns outside of `jit` are buffers of the state itself."""
    history, state = oc.History(), {"loss": jnp.float32(0.0), "steps": jnp.int32(0)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    for _ in range(5):
        history.append(state)
        state = step(state)
    np.testing.assert_array_equal(history.arrays()["loss"], np.arange(5.0))


def test_a_history_is_no_part_of_a_compiled_step():
    history = oc.History()
    with pytest.raises(ValueError, match="is for the host, between steps"):
        jax.jit(lambda x: history.append({"loss": x}))(1.0)
