"""Plots: the right numbers in the lines, on the axes given, and nothing closed or left open."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import optaxclip
from optaxclip import plots
from optaxclip.tuning import Sweep

NORMS = np.array([1.0, 4.0, np.nan, 0.5, 3.0])
CLIPPED = np.array([0.0, 1.0, 0.0, 0.0, 1.0])
HISTORY = [
    {"clip/grad_norm": jnp.float32(n), "clip/bound": 2.0, "clip/clipped": c, "loss": 9.0 - i}
    | {f"clip/grad_norm/{name}": n * factor for name, factor in (("enc/w", 1.0), ("head", 0.1))}
    for i, (n, c) in enumerate(zip(NORMS, CLIPPED, strict=True))
]


def a_sweep(final=((3.0, 3.1), (1.0, 1.1), (2.0, np.nan), (np.nan, np.inf))):
    runs = np.zeros((4, 2, 5))
    runs[0] = 1.0
    values = np.array([0.1, 1.0, 10.0, np.inf])
    return Sweep(values, np.arange(2), np.array(final), runs, runs, runs, 4.0, np.inf)


DRAWN = {
    "norms": lambda ax: plots.plot_norms(HISTORY, ax),
    "loss": lambda ax: plots.plot_loss(HISTORY, ax),
    "share": lambda ax: plots.plot_clipped_share(HISTORY, ax),
    "layers": lambda ax: plots.plot_layers(HISTORY, ax),
    "histogram": lambda ax: plots.plot_histogram(HISTORY, ax, thresholds=[2.0]),
    "sweep": lambda ax: plots.plot_sweep(a_sweep(), ax),
    "cliff": lambda ax: plots.plot_cliff(ax, resolution=8, steps=3),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWN)
def test_axes_in_and_axes_out(name):
    plt.close("all")
    other = plt.figure()
    figure, ax = plt.subplots()
    assert DRAWN[name](ax) is ax and plt.get_fignums() == [other.number, figure.number]
    figure.canvas.draw()
    new = DRAWN[name](None)
    assert new.figure is not figure and len(plt.get_fignums()) == 3
    new.figure.canvas.draw()


def test_norms_bound_and_clipped_steps():
    ax = plots.plot_norms(HISTORY)
    norm, bound, clipped, bad = ax.lines
    np.testing.assert_array_equal(norm.get_ydata(), NORMS)
    np.testing.assert_array_equal(bound.get_ydata(), [2.0] * 5)
    np.testing.assert_array_equal(clipped.get_xdata(), [1, 4])
    assert bad.get_xdata().tolist() == [2] and ax.get_yscale() == "log"
    assert "40%" in clipped.get_label() and "1" in bad.get_label()
    assert {line.get_linestyle() for line in (norm, bound)} == {
        "-",
        "--",
    }  # told apart without colour
    free = plots.plot_norms([{"grad_norm": 1.0, "bound": np.inf}])
    assert len(free.lines) == 1


def test_loss_and_clipped_share():
    loss, clipped = plots.plot_loss(HISTORY).lines
    np.testing.assert_array_equal(loss.get_ydata(), [9, 8, 7, 6, 5])
    np.testing.assert_array_equal(clipped.get_ydata(), [8, 5])
    recent, total = plots.plot_clipped_share(HISTORY, window=2).lines
    np.testing.assert_allclose(recent.get_ydata(), [0, 0.5, 0.5, 0, 0.5])
    np.testing.assert_allclose(total.get_ydata(), [0, 1 / 2, 1 / 3, 1 / 4, 2 / 5])
    with pytest.raises(ValueError, match="no 'loss' in the history"):
        plots.plot_loss([{"clip/grad_norm": 1.0}])


def test_layers_have_names_and_norms():
    ax = plots.plot_layers(HISTORY)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["enc/w", "head"]
    (mesh,) = ax.collections
    np.testing.assert_allclose(
        mesh.get_array().filled(np.nan), np.stack([NORMS, NORMS * 0.1]), rtol=1e-6
    )
    coarse = plots.plot_layers({"a": np.arange(1.0, 101.0)}, columns=10)
    np.testing.assert_allclose(
        coarse.collections[0].get_array().ravel(), np.arange(10.0, 101.0, 10.0)
    )
    with pytest.raises(ValueError, match="no norms by layer"):
        plots.plot_layers([{"clip/grad_norm": 1.0}])


def test_the_histogram_says_what_would_be_clipped():
    norms = np.arange(1.0, 101.0)
    ax = plots.plot_histogram(norms, quantiles=[0.5, 0.9], thresholds=[80.0, 1000.0], bins=7)
    labels = [line.get_label() for line in ax.lines]
    assert labels == [
        "50% are below 50.5",
        "90% are below 90.1",
        "80 would clip 20%",
        "1e+03 would clip 0%",
    ]
    assert sum(bar.get_height() for bar in ax.patches) == 100 and len(ax.patches) == 7
    with pytest.raises(ValueError, match="no norm is finite"):
        plots.plot_histogram([np.nan, 0.0])


def test_the_sweep():
    ax = plots.plot_sweep(a_sweep())
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), [3.05, 1.05, np.nan]
    )  # the third: the median diverged
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"recommended: 1", "no clip: 2/2 diverged", "diverged", "clip rate (right)"} <= set(
        labels
    )
    (beside,) = (other for other in ax.figure.axes if other is not ax)
    np.testing.assert_array_equal(beside.lines[0].get_ydata(), [1, 0, 0])
    assert [text.get_text() for text in ax.texts] == ["1/2"]
    plots.plot_sweep(
        a_sweep(np.full((4, 2), np.nan))
    ).figure.canvas.draw()  # every run diverged: an empty picture, no error


def test_descent_is_thrown_out_without_a_clip_and_not_with_it():
    plain, clipped = plots.plot_cliff(resolution=8).lines[:2]
    assert np.abs(plain.get_xydata()[-1]).max() > 6
    x, y = clipped.get_xydata().T
    assert x.min() > 4.2 and x.max() < 5.6 and y.min() > -2.75 and y.max() < -1.65
    points = jnp.asarray([plain.get_xydata()[-1], clipped.get_xydata()[-1]])
    start = plots.cliff.unit_loss(jnp.asarray([5.2, -2.3]))
    assert plots.cliff.unit_loss(points[1]) < start < plots.cliff.unit_loss(points[0])


def test_an_empty_history_is_refused():
    for empty in ([], {}, {"clip/grad_norm": []}):
        with pytest.raises(ValueError, match="at least one step"):
            plots.plot_norms(empty)


def test_a_clip_that_does_not_measure_is_drawn_by_what_the_watch_saw():
    row = {"clip/bound": 1.0, "clip/steps": 1.0, "watch/grad_norm": 3.0, "watch/grad_norm/w": 3.0}
    assert plots.plot_histogram([row], bins=1).patches[0].get_height() == 1
    assert [label.get_text() for label in plots.plot_layers([row]).get_yticklabels()] == ["w"]
    with pytest.raises(ValueError, match="the clip does not measure: pass it measure=True"):
        plots.plot_norms([row])


@pytest.mark.parametrize(
    ("draw", "key"),
    [
        (plots.plot_norms, "grad_norm"),
        (plots.plot_histogram, "grad_norm"),
        (plots.plot_clipped_share, "clipped"),
    ],
    ids=["norms", "histogram", "share"],
)
def test_a_history_without_what_is_drawn_is_refused(draw, key):
    with pytest.raises(
        ValueError, match=f"{draw.__name__}: no '{key}' in the history .*append optaxclip.metrics"
    ):
        draw([{"loss": 1.0}])


@pytest.mark.parametrize(
    "wrong", [1.0, [1.0], optaxclip.clip(1.0).init(jnp.ones(1))], ids=["number", "list", "state"]
)
def test_what_is_no_history_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"must be an optaxclip.History, .*got (float|list|ClipState)"
    ):
        plots.plot_norms(wrong)


def test_of_several_clips_one_is_drawn():
    history = [{"clip/0/grad_norm": 1.0, "clip/1/grad_norm": 2.0}]
    assert plots.plot_norms(history, clip=1).lines[0].get_ydata().tolist() == [2.0]


def test_nothing_is_imported_before_it_is_drawn_and_the_extra_is_named():
    code = """
import sys, optaxclip, optaxclip.tuning
assert not {"matplotlib", "optuna"} & set(sys.modules)
sys.modules["matplotlib.pyplot"] = sys.modules["optuna"] = None
objective = optaxclip.tuning.objective
calls = {"plot": optaxclip.plots.plot_cliff, "tune": lambda: objective(0, 0, 0, batches=[])}
for extra, call in calls.items():
    try:
        call()
    except ImportError as error:
        assert f"pip install 'optaxclip[{extra}]'" in str(error), error
    else:
        raise AssertionError(extra)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
