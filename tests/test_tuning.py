"""`tune`: one compilation, the same numbers as separate runs, and the planted threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.tuning import Sweep, objective
from optaxclip.tuning.runs import first_argument

BATCHES = [jnp.float32(x) for x in np.linspace(0.5, 1.5, 12)]


pytestmark = pytest.mark.usefixtures("mixed_dtypes")  # Optax promotes dtypes


def make_tx(value):
    return optax.chain(optaxclip.clip_by_global_norm(value), optax.sgd(0.1))


def init(value, key):
    params = {"w": 1.0 + jax.random.uniform(key, (3,))}
    return params, make_tx(value).init(params)


def step(value, state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 4) * batch)(params)
    updates, opt_state = make_tx(value).update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


jitted = jax.jit(step)


def by_hand(value, seed, batches=BATCHES):
    state, losses, rates = init(value, jax.random.key(seed)), [], []
    for batch in batches:
        state, loss = jitted(value, state, batch)
        losses.append(float(loss))
        rates.append(float(optaxclip.metrics(state)["clip/clipped"]))
    return losses, rates


def test_the_sweep_is_the_runs_one_by_one():
    sweep = optaxclip.tune(step, init, [3.0, 0.5], batches=BATCHES, seeds=[4, 7], baseline=None)
    assert sweep.values.tolist() == [0.5, 3.0] and sweep.final.shape == (2, 2)
    for i, value in enumerate(sweep.values):
        for j, seed in enumerate(sweep.seeds):
            losses, rates = by_hand(float(value), int(seed))
            np.testing.assert_allclose(sweep.losses[i, j], losses, rtol=1e-5)
            np.testing.assert_array_equal(sweep.clipped[i, j], rates)
            assert sweep.final[i, j] == sweep.losses[i, j, -1]


@pytest.mark.parametrize("at_once", [None, 4])
def test_one_compile_in_all(at_once):
    traced = []

    def counted(*args):
        traced.append(1)
        return step(*args)

    optaxclip.tune(counted, init, [0.1, 1.0, 2.0], batches=BATCHES, at_once=at_once)
    assert len(traced) == 1


def test_in_parts_is_the_same():
    whole = optaxclip.tune(
        step, init, [0.1, 1.0], batches=BATCHES, evaluate=lambda state: jnp.sum(state[0]["w"])
    )
    parts = optaxclip.tune(
        step,
        init,
        [0.1, 1.0],
        batches=iter(BATCHES),
        at_once=4,
        evaluate=lambda state: jnp.sum(state[0]["w"]),
    )
    for a, b in zip(whole[:-1], parts[:-1], strict=True):  # the last is a name
        np.testing.assert_allclose(a, b, rtol=1e-6)


def planted(best):
    """A train step whose loss is least at one threshold; beyond 50 times that it is NaN."""

    def start(value, key):
        return jnp.zeros(()), jax.random.normal(key) * 0.01

    def one(value, state, batch):
        steps, noise = state
        loss = 1.0 + jnp.log(value / best) ** 2 * (steps > 0) + noise
        return (steps + 1, noise), jnp.where(
            steps > 0, jnp.where(value > 50 * best, jnp.nan, loss), 5.0
        )

    return one, start


@pytest.mark.parametrize("best", [0.1, 1.0, 10.0])
def test_the_planted_threshold_is_found(best):
    sweep = optaxclip.tune(*planted(best), [0.01, 0.1, 1.0, 10.0, 100.0], batches=range(5), seeds=4)
    assert sweep.recommended.value == best
    assert sweep.recommended.low == sweep.recommended.high == best
    assert (
        sweep.diverged[-1].all()
        and np.isinf(sweep.values[-1])
        and not sweep.diverged[sweep.values == best].any()
    )
    lines = str(sweep).splitlines()
    assert lines[7].startswith("| no clip | inf |") and lines[7].endswith("| 100% |")
    assert lines[-1].startswith(f"Recommended: {best:g}, alone")


def test_table_and_plot_have_the_name_of_what_is_swept():
    def step(max_norm, state, batch):
        return jitted(max_norm, state, batch)

    sweep = optaxclip.tune(step, init, [0.5], batches=BATCHES[:1], seeds=1, baseline=None)
    assert str(sweep).startswith("| max_norm | final loss")
    assert optaxclip.plots.plot_sweep(sweep).get_xlabel() == "max_norm"
    assert first_argument(lambda *numbers: numbers) == "value" == first_argument(lambda: 0)


def sweep_of(final, values=(0.1, 1.0, 10.0, np.inf), failed=9.0):
    final = np.asarray(final, float)
    runs = np.zeros((*final.shape, 2))
    return Sweep(
        np.asarray(values), np.arange(final.shape[1]), final, runs, runs, runs, failed, np.inf
    )


def test_the_middle_of_the_plateau():
    sweep = sweep_of([[2.0, 4.0], [2.1, 4.1], [2.2, 4.2], [8.0, 8.0]])
    assert (sweep.recommended.low, sweep.recommended.value, sweep.recommended.high) == (
        0.1,
        1.0,
        10.0,
    )
    assert sweep.recommended.error == pytest.approx(1.0)


def test_a_diverged_run_counts_as_no_training():
    sweep = sweep_of([[5.0, 5.0, 5.0], [1.0, 1.1, np.nan], [1.0, np.inf, 1e30], [np.nan] * 3])
    np.testing.assert_allclose(sweep.diverged.mean(axis=1), [0, 1 / 3, 2 / 3, 1])
    assert sweep.recommended.value == 1.0 and sweep.recommended.mean == pytest.approx(
        (1 + 1.1 + 9) / 3
    )
    nothing = sweep_of([[np.nan], [np.inf], [10.0], [99.0]]).recommended
    assert np.isnan(nothing.value) and "Every run diverged" in nothing.why


def test_no_clip_may_be_best():
    worse = sweep_of([[5.0, 5.1], [4.0, 4.1], [3.0, 3.1], [1.0, 1.1]]).recommended
    assert worse.value == np.inf and "no clip" in worse.why
    same = sweep_of([[5.0, 5.1], [4.0, 4.1], [1.0, 1.1], [1.0, 1.1]]).recommended
    assert same.value == 10.0 and "insurance" in same.why


def test_the_last_tenth_decides_and_one_nan_does_not():
    def one(value, state, batch):
        return state, jnp.where(batch == 38, jnp.nan, 40.0 - batch)

    sweep = optaxclip.tune(
        one, lambda value, key: jnp.zeros(()), [1.0], batches=range(40), seeds=1, baseline=None
    )
    assert sweep.final[0, 0] == np.median([4.0, 3.0, np.inf, 1.0])
    assert np.isnan(sweep.clip_rate).all() and "| 3.5 |" in str(
        sweep
    )  # no clip in the state, so no rate


def test_any_number_of_any_clip():
    def two_clips(value, state, batch):
        params, opt_state = state
        tx = optax.chain(optaxclip.zclip(2.0), optaxclip.adaptive_grad_clip(value), optax.sgd(0.01))
        updates, opt_state = tx.update({"w": params["w"] * batch}, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), jnp.sum(params["w"])

    def start(value, key):
        params = {"w": jnp.ones(3)}
        tx = optax.chain(optaxclip.zclip(2.0), optaxclip.adaptive_grad_clip(value), optax.sgd(0.01))
        return params, tx.init(params)

    sweep = optaxclip.tune(two_clips, start, [0.1], batches=BATCHES[:2], seeds=1)
    np.testing.assert_allclose(sweep.clip_rate, [1.0, 0.0])
    assert sweep.norms[0, 0, 0] == pytest.approx(3**0.5 / 2)  # before the first clip


@pytest.mark.parametrize(
    ("values", "more", "words"),
    [
        ([], {}, "values must be a list of numbers"),
        ([np.nan], {}, "values must be a list of numbers"),
        (1.0, {}, "values must be a list of numbers"),
        ([1.0], {"seeds": 0}, "seeds must be"),
        ([1.0], {"batches": []}, "there must be at least one batch"),
        ([1.0], {"at_once": 0}, "at_once must be"),
    ],
    ids=["no values", "NaN", "one number", "no seeds", "no batches", "none at once"],
)
def test_mistakes_are_named(values, more, words):
    with pytest.raises(ValueError, match=f"tune: {words}"):
        optaxclip.tune(step, init, values, **{"batches": BATCHES, **more})


FORMS = {
    "step of two": (
        {"step": lambda state, batch: 0},
        r"step must be a function of \(value, state, batch\), got step",
    ),
    "init of one": (
        {"init": lambda key: 0},
        r"init must be a function of \(value, key\), got init\(key\)",
    ),
    "evaluate of two": ({"evaluate": lambda a, b: 0}, r"evaluate must be a function of \(state\)"),
    "no function": ({"step": 1.0}, "step must be a function of"),
    "only a loss": (
        {"step": lambda value, state, batch: jnp.sum(state[0]["w"])},
        "step must return",
    ),
    "loss first": (
        {"step": lambda *args: step(*args)[::-1]},
        r"step must return \(new state, loss\), in this order",
    ),
    "loss of several": ({"step": lambda value, state, batch: (state, state[0]["w"])}, "shape"),
    "evaluate to a state": ({"evaluate": lambda state: state}, "evaluate must return a loss"),
}


@pytest.mark.parametrize("case", FORMS)
def test_functions_of_another_form_are_rejected(case):
    wrong, words = FORMS[case]
    more = {"step": step, "init": init, "evaluate": None, "batches": BATCHES[:1]} | wrong
    with pytest.raises(ValueError, match=f"tune: .*{words}"):
        optaxclip.tune(values=[1.0], **more)
    if case != "evaluate to a state":
        with pytest.raises(ValueError, match=f"objective: .*{words}"):
            objective(suggest=lambda trial: 1.0, **more)(None)


def test_a_clip_that_does_not_measure_has_no_rate():
    def start(value, key):
        return jnp.ones(2), optaxclip.clip_by_value(-value, value).init(jnp.ones(2))

    sweep = optaxclip.tune(
        lambda value, state, batch: (state, state[0][0]), start, [1.0], batches=[0], seeds=1
    )
    assert np.isnan(sweep.clip_rate).all() and np.isnan(sweep.norms).all()


def test_optuna_has_one_compile_for_all_trials_and_the_same_numbers():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    traced = []

    def counted(value, state, batch):
        traced.append(1)
        return step(value["max_norm"], state, batch)

    def start(value, key):
        return init(value["max_norm"], key)

    def suggest(trial):
        return {"max_norm": trial.suggest_float("max_norm", 0.05, 5.0, log=True)}

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        objective(counted, start, suggest, batches=BATCHES, seeds=2, failed=np.inf), n_trials=6
    )
    assert len(traced) == 1
    trial = study.trials[0]
    wanted = [by_hand(trial.params["max_norm"], seed)[0][-1] for seed in range(2)]
    assert trial.value == pytest.approx(np.mean(wanted), rel=1e-5)
    assert trial.intermediate_values and all(
        np.isfinite(x.value) for x in study.trials if x.value is not None
    )


def test_optuna_prunes():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.ThresholdPruner(upper=0.5)
    study = optuna.create_study(pruner=pruner)
    study.optimize(objective(step, init, lambda trial: 1e-6, batches=BATCHES, seeds=1), n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
