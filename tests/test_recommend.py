"""`recommend`: shares agree with NumPy; planted reasons are found, and nothing else."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

RNG = np.random.default_rng(0)
PLAIN = RNG.lognormal(0.0, 0.4, 1000)
STEADY = RNG.lognormal(0.0, 0.2, 1000)
TIME = np.linspace(0, 1, 1000)


def names(norms):
    return [reason.name for reason in optaxclip.recommend(norms).reasons]


def test_shares_match_numpy():
    found = optaxclip.recommend(PLAIN)
    for share, bound in found.thresholds.items():
        assert bound == np.quantile(PLAIN, 1 - share)
        assert np.sum(bound < PLAIN) == round(share * 1000)
    assert list(optaxclip.recommend(PLAIN, shares=(0.2, 0.5)).thresholds) == [0.2, 0.5]


PLANTED = {
    "ordinary": PLAIN,
    "steady": STEADY,
    "heavy-tail": 1 + RNG.pareto(1.5, 1000),
    "spikes": np.where(np.arange(1000) % 200 == 99, 50.0, 1.0) * STEADY,
    "falls": STEADY * np.exp(-2 * TIME),
    "rises": STEADY * np.exp(2 * TIME),
    "a transient at the start": STEADY * np.exp(5 * np.exp(-TIME / 0.01)),
    "layers": STEADY[:, None] * np.array([1.0, 5.0, 100.0]),
    "like layers": STEADY[:, None] * np.array([1.0, 5.0, 10.0]),
    "nan": np.where(np.arange(1000) % 100 == 5, np.nan, STEADY),
    "inf": np.where(np.arange(1000) == 5, np.inf, STEADY),
    "zeros": np.where(np.arange(1000) % 3 == 0, 0.0, STEADY),
    "both": (1 + RNG.pareto(1.5, 1000)) * np.exp(-4 * TIME),
}
WANTED = {
    "ordinary": ["ordinary"],
    "steady": ["steady"],
    "heavy-tail": ["heavy-tail"],
    "spikes": ["spikes"],
    "falls": ["drift"],
    "rises": ["drift"],
    "a transient at the start": ["heavy-tail"],
    "layers": ["layer-scales"],
    "like layers": ["steady"],
    "nan": ["nonfinite", "steady"],
    "inf": ["nonfinite", "steady"],
    "zeros": ["steady"],
    "both": ["drift", "heavy-tail"],
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_reasons_are_found_and_the_code_runs(case):
    found = optaxclip.recommend(PLANTED[case])
    assert [reason.name for reason in found.reasons] == WANTED[case]
    scope = {"optax": optax, "optaxclip": optaxclip, "optimizer": optax.sgd(0.1)}
    exec(found.code, scope)
    grads = {"a": jnp.ones(3), "b": jnp.ones(2)}
    updates, _ = scope["tx"].update(grads, scope["tx"].init(grads), grads)
    assert np.isfinite(updates["a"]).all()
    assert found.code in str(found) and all(reason.what in str(found) for reason in found.reasons)


def test_silent_on_plain_series():
    rng = np.random.default_rng(1)
    said = [name for _ in range(100) for name in names(rng.lognormal(0.0, 0.4, 300))]
    assert not {"drift", "heavy-tail", "spikes"} & set(said)


def test_the_numbers():
    numbers = optaxclip.recommend(PLANTED["falls"]).numbers
    assert numbers.drift == pytest.approx(np.exp(-2), rel=0.1) and numbers.steps == 1000
    assert numbers.tail_ratio == pytest.approx(
        np.exp(0.2 * 2.326), rel=0.1
    )  # the drift is taken out first
    assert optaxclip.recommend(PLANTED["heavy-tail"]).numbers.tail_index == pytest.approx(
        1.5, abs=0.5
    )
    assert optaxclip.recommend(PLANTED["layers"]).numbers.scale_ratio == pytest.approx(100)
    assert optaxclip.recommend(PLANTED["nan"]).numbers[1:3] == (10, 0)


@pytest.mark.parametrize(
    "norms",
    [[1.0, 2.0, 3.0], np.zeros(100), np.full(100, np.nan), np.arange(19.0)],
    ids=["three", "zeros", "NaN", "nineteen"],
)
def test_too_few_steps_are_reported(norms):
    found = optaxclip.recommend(norms)
    assert (
        found.reasons[0].name == "too-few-steps"
        and found.code == ""
        and "nan" not in str(found).split(".")[0]
    )
    assert list(optaxclip.recommend(PLAIN[:50]).thresholds) == [
        0.05,
        0.10,
    ]  # fifty steps cannot show 1 %


def test_too_few_steps_are_counted_or_explained():
    found = [optaxclip.recommend(x).reasons[0].what for x in (np.ones(3), [1.0, np.nan, 0.0])]
    assert found[0] == "3 steps are too few." and found[1].startswith("only 1 of 3 steps have")


def test_one_step_or_a_state_is_rejected_with_what_to_record():
    state = optaxclip.clip_by_global_norm(1.0).init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"recommend: this is one step.*a History"):
        optaxclip.recommend(optaxclip.metrics(state))
    for wrong in (state, (state, optax.EmptyState())):
        with pytest.raises(ValueError, match=r"history\.append\(optaxclip\.metrics\(opt_state"):
            optaxclip.recommend(wrong)


def test_every_form_of_input_gives_the_same_advice():
    layers = PLANTED["layers"]
    whole = optaxclip.recommend(layers)
    np.testing.assert_allclose(
        whole.thresholds[0.05], np.quantile(np.linalg.norm(layers, axis=1), 0.95)
    )
    np.testing.assert_allclose(whole.layers["2"][0.05], np.quantile(layers[:, 2], 0.95))
    by_name = optaxclip.recommend({"0": layers[:, 0], "1": layers[:, 1], "2": layers[:, 2]})
    history = [
        {f"clip/grad_norm/{i}": x for i, x in enumerate(row)} | {"clip/grad_norm": max(row)}
        for row in layers
    ]
    assert by_name == whole and optaxclip.recommend(history) == whole
    plain = [{"clip/grad_norm": jnp.float32(x), "loss": 1.0} for x in PLAIN[:100]]
    assert (
        optaxclip.recommend(plain).layers == {} and optaxclip.recommend(plain).numbers.steps == 100
    )
    watched = [
        row | {"clip/bound": 1.0} for row in watch_rows(layers)
    ]  # from a clip that does not measure
    assert optaxclip.recommend(watched) == whole


def watch_rows(layers):
    return [
        {f"watch/grad_norm/{i}": x for i, x in enumerate(row)} | {"watch/grad_norm": max(row)}
        for row in layers
    ]


@pytest.mark.parametrize(
    "head", ["clip/1/", "clip/3/watch/", "watch/0/", "train/clip/", "train/clip/1/", "skip/1/"]
)
def test_norms_are_found_under_any_prefix(head):
    idle = {"clip/0/bound": 1.0, "loss": 2.0}
    rows = [idle | {f"{head}grad_norm": x, f"{head}bound": 9.0} for x in PLAIN[:100]]
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for history in (rows, columns):
        assert (
            optaxclip.recommend(history).thresholds == optaxclip.recommend(PLAIN[:100]).thresholds
        )
    layers = [{f"{head}grad_norm/{i}": x for i, x in enumerate((x, 2 * x))} for x in PLAIN[:100]]
    assert list(optaxclip.recommend(layers).layers) == ["0", "1"]


@pytest.mark.parametrize("key", ["clip/1/bound", "clip/bound", "train/clip/0/clipped"])
def test_a_recording_without_norms_lists_its_keys(key):
    with pytest.raises(ValueError, match=f"no 'grad_norm' among .*{key}"):
        optaxclip.recommend({key: np.ones(50)})


def test_norms_of_any_size():
    assert names(STEADY * 1e300) == ["steady"] and names(STEADY[:, None] * [1e300, 2e300]) == [
        "steady"
    ]
    assert names(np.ones(100)) == ["steady"]
    rare = optaxclip.recommend(np.where(np.arange(1000) % 30 == 0, STEADY, 0.0))
    assert "(0)" not in rare.code and list(rare.thresholds) == [
        0.01
    ]  # a bound of 0 would clip all to nothing


@pytest.mark.parametrize(
    "norms", [np.ones((2, 2, 2)), [], 1.0], ids=["three axes", "empty", "a number"]
)
def test_other_shapes_are_rejected(norms):
    with pytest.raises(ValueError, match="norms must have"):
        optaxclip.recommend(norms)


@pytest.mark.parametrize(
    "history",
    [{"loss": np.ones(50)}, [{"loss": 1.0}] * 50, [{"accuracy": 1.0}] * 50],
    ids=["losses", "rows of losses", "rows of accuracies"],
)
def test_losses_are_not_mistaken_for_norms(history):
    with pytest.raises(ValueError, match="there is no 'grad_norm' among"):
        optaxclip.recommend(history)


def test_shares_out_of_range_are_rejected():
    with pytest.raises(ValueError, match="shares"):
        optaxclip.recommend(PLAIN, shares=(5.0,))
