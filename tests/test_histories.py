"""Recorded runs as people really have them: rows that lack keys, restarts, text, gaps."""

import csv
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest

import optaxclip as oc
from optaxclip.monitoring.fits import guess_recorded
from optaxclip.monitoring.recorded import read_run

N = 200
RNG = np.random.default_rng(0)
NOISE = np.exp(0.3 * RNG.normal(size=N))
FALLING = 3.0 * 0.99 ** np.arange(N) + 0.05 * RNG.normal(size=N)
STEPS = np.arange(1, N + 1)
EXPLOSION = np.r_[NOISE[:180], 1.9 ** np.arange(1, 13), [np.nan] * 8]  # from step 181 to 193


def table(norms, **more):
    clip = {"grad_norm": norms, "bound": np.ones(len(norms)), "clipped": 1.0 * (norms > 1)}
    return {f"clip/{key}": x for key, x in clip.items()} | more


def rows(columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def first_sign(history):
    found = oc.diagnose(history)
    return (found[0].name, found[0].step) if found else ()


def now_and_then(row, i, every, *keys):
    """A row in which these keys are only at every so many steps."""
    return {key: x for key, x in row.items() if key not in keys or i % every == 0}


EXPLODED = {
    "from step 5000": (table(EXPLOSION, step=STEPS + 4999), 5180),
    "from step 0": (table(EXPLOSION, step=STEPS - 1), 180),
    "every hundredth": (table(EXPLOSION, step=100 * STEPS), 18100),
    "one block": ({"watch/grad_norm": EXPLOSION, "watch/grad_norm/w": EXPLOSION}, 181),
    "None": ([row | {"loss": None} for row in rows(table(EXPLOSION))], 181),
    "text": ([{k: str(x) for k, x in row.items()} for row in rows(table(EXPLOSION))], 181),
    "columns of text": ({k: list(map(str, x)) for k, x in table(EXPLOSION).items()}, 181),
    "any iterable": (tuple(rows(table(EXPLOSION))), 181),
}


@pytest.mark.parametrize("case", EXPLODED)
def test_an_explosion_is_found_at_its_step(case):
    history, step = EXPLODED[case]
    assert first_sign(history) == ("norms-exploding", step)
    assert "nonfinite" in {reason.name for reason in oc.recommend(history).reasons}
    figure = oc.plots.plot_run(history)
    assert figure.axes[0].get_xlim()[0] < step < figure.axes[0].get_xlim()[1]
    plt.close(figure)


def test_the_steps_of_a_rise_are_steps_and_not_rows():
    (sign,) = oc.diagnose(table(EXPLOSION, step=100 * STEPS))
    assert sign.evidence["steps"] == 1200 and "within 1200 steps from step 18100" in sign.what
    (near,) = oc.diagnose(table(EXPLOSION))
    assert sign.evidence["doubling_steps"] == pytest.approx(100 * near.evidence["doubling_steps"])


def test_an_explosion_at_the_start_of_a_late_record_did_not_begin_with_the_run():
    began, late = (table(EXPLOSION[170:], step=at + STEPS[:30]) for at in (0, 5000))
    assert "it began with the run" in oc.diagnose(began)[0].fix
    assert "it began with the run" not in oc.diagnose(late)[0].fix
    first = np.r_[5e3, np.full(9, np.nan)]
    assert first_sign(table(first))[0] == "norms-exploding"
    assert first_sign(table(first, step=STEPS[:10] + 5000))[0] == "norm-not-finite"


def test_after_a_restart_the_later_rows_count():
    again = np.r_[0:100, 60:200]  # crashed at step 100, went on from step 60
    columns = {key: x[again] for key, x in table(EXPLOSION, step=STEPS, loss=FALLING).items()}
    columns["loss"][60:100] = np.nan  # what was replaced does not matter
    assert first_sign(columns) == ("norms-exploding", 181)
    np.testing.assert_array_equal(read_run(columns).steps, STEPS)
    assert np.isfinite(read_run(columns).losses).all()
    late = {"grad_norm": [1.0, 3.0, 2.0], "step": [1, 3, 2]}  # reports may arrive out of order
    assert read_run(late).norms.tolist() == [1, 2, 3] == read_run(late).steps.tolist()
    beside = {"grad_norm": np.ones(6), "step": [1, 1, 2, 2, 3, 3]}  # two rows a step
    assert len(read_run(beside).steps) == 6 == len(read_run(beside | {"run": [0, 1] * 3}).steps)
    several = {"grad_norm": np.ones(6), "step": [1, 2, 3] * 2, "run": [0, 0, 0, 1, 1, 1]}
    assert len(read_run(several).steps) == 6


@pytest.mark.parametrize("every", [2, 10])
def test_a_loss_recorded_now_and_then_is_not_nan_in_between(every):
    history = [now_and_then(r, i, every, "loss") for i, r in enumerate(rows(_healthy()))]
    assert oc.diagnose(history) == ()
    ax = oc.plots.plot_loss(history)
    assert len(ax.lines[0].get_xdata()) == N // every
    assert [text for text in ax.get_legend_handles_labels()[1] if "NaN" in text] == []
    plt.close(ax.figure)
    columns = read_run(history).table
    columns["loss"][150:] = np.nan
    assert first_sign(columns) == ("loss-not-finite", 151)
    columns["loss"][150:] = FALLING[150:]
    columns["loss"][99:150] = np.nan  # not evenly
    assert first_sign(columns)[0] == "loss-not-finite"


def _healthy():
    return table(NOISE, loss=FALLING) | {"clip/steps": STEPS}


def test_a_full_history_keeps_a_spike_beside_losses_recorded_now_and_then():
    history = oc.History(max_steps=100)
    for i in range(3000):
        row = {"watch/grad_norm": 1e4 if i == 1234 else 1.0 + i % 2}
        history.append(row if i % 10 else row | {"loss": 1.0})
    assert history.steps[history.arrays()["watch/grad_norm"] == 1e4] == [1235]


@pytest.mark.parametrize("every", [2, 10])
def test_a_full_history_keeps_losses_recorded_now_and_then(every):
    history, steps = oc.History(max_steps=100), 3000
    for i in range(1, steps + 1):
        row = {"clip/grad_norm": NOISE[i % N], "clip/bound": 9.0, "clip/clipped": 0.0}
        history.append(row | {"loss": 3.0 - i / steps} if i % every == 0 else row)
    losses = history.arrays()["loss"]
    assert np.isfinite(losses).mean() == pytest.approx(1 / every, rel=0.5)
    assert oc.diagnose(history) == ()


def test_a_loss_that_is_nan_at_every_other_step_is_nan():
    history = rows(_healthy() | {"loss": np.where(STEPS % 2, FALLING, np.nan)})
    assert first_sign(history) == ("loss-not-finite", 2)
    skipped = [row if row["loss"] == row["loss"] else row | {"loss": None} for row in history]
    assert oc.diagnose(skipped) == ()


@pytest.mark.parametrize("counted", [True, False])
def test_norms_recorded_now_and_then_are_not_nan_in_between(counted):
    keys = ["clip/grad_norm", "clip/bound", "clip/clipped", "clip/steps"][: 3 + counted]
    columns = _healthy() if counted else table(NOISE, loss=FALLING)
    history = [now_and_then(row, i, 10, *keys) for i, row in enumerate(rows(columns))]
    assert oc.diagnose(history) == ()
    assert {reason.name for reason in oc.recommend(history).reasons} == {"steady"}
    axes = oc.plots.plot_run(history).axes
    share = np.mean(NOISE[::10] > 1)
    labels = axes[1].get_legend_handles_labels()[1]
    assert labels == [
        "norm before the clip",
        "bound",
        f"clipped: {share:.0%} of steps".replace("%", " %"),
    ]
    assert len(axes[0].lines[0].get_xdata()) == N  # all losses
    plt.close(axes[0].figure)


def test_norms_that_are_nan_at_every_other_step_are_nan_if_a_counter_says_so():
    norms = np.where(STEPS % 2, NOISE, np.nan)
    assert first_sign(_healthy() | {"clip/grad_norm": norms}) == ("norm-not-finite", 2)


def test_what_is_known_too_rarely_is_not_judged():
    assert guess_recorded(np.array([1.0, np.nan, np.nan, 1.0])).all()
    lost = np.array([2.3] + [np.nan] * 30)
    assert first_sign({"grad_norm": lost, "loss": lost})[0] == "loss-not-finite"


def test_a_run_of_only_losses_that_are_nan_has_finite_norms():
    assert first_sign(table(NOISE, loss=np.where(STEPS > 150, np.nan, FALLING))) == (
        "loss-not-finite",
        151,
    )


def test_what_to_csv_wrote_is_a_history():
    file = io.StringIO()
    log = oc.loggers.to_csv(file)
    for step, row in enumerate(rows(table(EXPLOSION)), start=1):
        log(step, row)
    file.seek(0)
    assert first_sign(list(csv.DictReader(file))) == ("norms-exploding", 181)


WRONG = {
    "no norms": ({"loss": FALLING}, r"no 'grad_norm'"),
    "text": (table(NOISE, phase=["train"] * N), "'phase' is text, 'train'.* leave this key out"),
    "rows with text": (
        [row | {"phase": "train"} for row in rows(table(NOISE))],
        "'phase' is text, 'train'.* leave this key out",
    ),
    "columns of other lengths": (table(NOISE, loss=FALLING[:50]), r"'loss': \(50,\)"),
    "logarithms": (table(np.log(NOISE)), "a norm is negative, .*not their logarithms"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_history_is_refused_by_name(case):
    history, message = WRONG[case]
    for read in (oc.diagnose, oc.recommend, oc.plots.plot_run):
        with pytest.raises(ValueError, match=f"^{read.__name__}: .*{message}"):
            read(history)
    with pytest.raises(ValueError, match="explain: opt_state must be the state"):
        oc.explain(history)
