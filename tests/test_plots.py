"""Plots: the right numbers in the lines, on the axes given, and nothing closed or left open."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from matplotlib.colors import to_rgb

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
    "bound": lambda ax: plots.plot_bound(HISTORY, ax),
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


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def test_norms_bound_clipped_share_and_bad_steps():
    ax = plots.plot_norms(HISTORY)
    norm, bound, bad = ax.lines
    np.testing.assert_array_equal(norm.get_ydata(), NORMS)
    np.testing.assert_array_equal(norm.get_xdata(), [1, 2, 3, 4, 5])  # from 1, as elsewhere
    np.testing.assert_array_equal(bound.get_ydata(), [2.0] * 5)
    assert bad.get_xdata().tolist() == [3] and ax.get_yscale() == "log"
    assert labels(ax)[2:] == ["clipped: 40 % of steps", "NaN or infinite: 1 step"]
    (band,) = (patch for patch in ax.patches if "clipped" in str(patch.get_label()))
    np.testing.assert_allclose(band.get_data().values / 0.12, CLIPPED)
    low = ax.transLimits.transform(ax.transScale.transform([3, 0.5]))[1]
    assert low > 0.12  # the band lies below the line
    # told apart without colour
    assert {line.get_linestyle() for line in (norm, bound)} == {"-", "--"}
    free = plots.plot_norms([{"grad_norm": 1.0, "bound": np.inf}])
    assert labels(free) == ["norm before the clip"]


def test_a_run_of_bad_steps_is_one_mark_and_zeros_are_another():
    norms = np.ones(1000)
    norms[400:] = np.nan
    norms[[10, 20]] = 0.0, np.inf
    ax = plots.plot_norms({"grad_norm": norms, "step": np.arange(1000) * 10 + 10})
    (hatched,) = ax.collections
    ends = [path.get_extents().intervalx.tolist() for path in hatched.get_paths()]
    assert ends == [[209.5, 210.5], [4009.5, 10000.5]]
    assert labels(ax)[1:] == ["NaN or infinite: 601 steps", "zero: 1 steps"]


def test_loss_bound_and_clipped_share():
    (loss,) = plots.plot_loss(HISTORY).lines
    np.testing.assert_array_equal(loss.get_ydata(), [9, 8, 7, 6, 5])
    wide = {"linear": [9.0, 8.0], "log": [9.0, 1e-3], "symlog": [-1.0, 1.0, 2.0, 1e9]}
    for scale, losses in wide.items():
        assert plots.plot_loss({"loss": losses}).get_yscale() == scale
    recent, total, bad = plots.plot_clipped_share(HISTORY, window=2).lines
    assert bad.get_xdata().tolist() == [3]
    np.testing.assert_allclose(recent.get_ydata(), [0, 0.5, 0.5, 0, 0.5])
    np.testing.assert_allclose(total.get_ydata(), [0, 1 / 2, 1 / 3, 1 / 4, 2 / 5])
    usual, bound, _ = plots.plot_bound(HISTORY).lines
    assert usual.get_ydata() == [2.0] and bound.get_ydata().tolist() == [2.0] * 5
    with pytest.raises(ValueError, match="no 'loss' in the history"):
        plots.plot_loss([{"clip/grad_norm": 1.0}])


def test_layers_have_names_and_norms():
    ax = plots.plot_layers(HISTORY)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["enc/w", "head"]
    mesh, hatched = ax.collections[0], ax.collections[1:]
    np.testing.assert_allclose(
        mesh.get_array().filled(np.nan), np.stack([NORMS, NORMS * 0.1]), rtol=1e-6
    )
    assert len(hatched) == 2 and ax.get_legend().get_texts()[0].get_text() == "NaN or infinite"
    coarse = plots.plot_layers({"a": np.arange(1.0, 101.0)}, columns=10)
    np.testing.assert_allclose(
        coarse.collections[0].get_array().ravel(), np.arange(10.0, 101.0, 10.0)
    )
    many = plots.plot_layers({f"blocks/{i}/" + "long" * 20: [1.0] for i in range(200)})
    ticks = [label.get_text() for label in many.get_yticklabels()]
    assert len(ticks) == 40 and max(map(len, ticks)) <= 36 and ticks[1].startswith("blocks/5/")
    dead = plots.plot_layers({"watch/grad_norm/a": [1.0, 0.0], "watch/grad_norm/b": [1.0, 1.0]})
    assert [text.get_text() for text in dead.get_legend().get_texts()] == ["zero"]
    with pytest.raises(ValueError, match="no norms by layer"):
        plots.plot_layers([{"clip/grad_norm": 1.0}])


def test_a_whole_run_with_its_signs():
    norms = np.r_[np.ones(100), 3.0 ** np.arange(20), np.full(20, np.nan)]
    layers = {f"w/grad_norm/{i}": norms / 2**0.5 for i in range(2)}
    watch = {"w/grad_norm": norms, "w/median_ratio": norms, **layers}
    figure = plots.plot_run(watch)
    assert [ax.get_ylabel() for ax in figure.axes] == ["gradient norm", "", "gradient norm"]
    found = optaxclip.diagnose(watch)
    text = figure._supxlabel.get_text().replace("\n   ", " ")
    assert [line.split(":")[0] for line in text.splitlines()] == [
        f"{i} {sign.name}" for i, sign in enumerate(found, start=1)
    ]
    clip = {"clip/grad_norm": np.ones(9), "clip/bound": np.ones(9), "clip/clipped": np.zeros(9)}
    names = [ax.get_ylabel() for ax in plots.plot_run(clip | {"loss": np.ones(9)}).axes]
    assert names == ["loss", "gradient norm", "share clipped"]
    part = plt.figure(layout="constrained").subfigures(1, 2)[0]
    assert plots.plot_run(watch, part) is part and len(part.axes) == 3


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_colors_differ_from_the_background_and_from_one_another_in_grey(style):
    with plt.style.context(style):
        ax = plots.plot_norms(HISTORY)
        used = (*plots.axes.colors_of(ax), ax.get_facecolor())
    light = sorted(map(grey, used))
    assert np.diff(light).min() > 0.08 and abs(light[0] - light[-1]) > 0.9


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_drawn_in_the_color_of_a_dark_background(name):
    """Lines beside their legend, and words beside their box."""
    with plt.style.context("dark_background"):
        ax = DRAWN[name](None)
    legend = ax.get_legend()
    behind = legend.get_frame().get_facecolor() if legend else (0, 0, 0, 1)
    pairs = [(x.get_color(), behind) for x in (legend.get_lines() if legend else ())]
    for text in ax.texts:
        box = text.get_bbox_patch()
        pairs.append((text.get_color(), box.get_facecolor() if box else ax.get_facecolor()))
    assert all(abs(grey(a) - grey(b)) > 0.15 for a, b in pairs), pairs


def grey(color):
    return np.dot(to_rgb(color), (0.3, 0.59, 0.11))


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


def test_the_elements_of_blocks_are_drawn_as_shares():
    found = optaxclip.loggers.histograms(optaxclip.watch(histogram=True).init({"a": jnp.ones(2)}))
    counts = {"a": np.eye(15)[8] * 4, "b": np.eye(15)[0] + np.eye(15)[1]}
    ax = plots.plot_histogram(found._replace(counts=counts))
    (mesh,) = ax.collections
    shares = mesh.get_array().reshape(2, 15)
    assert shares[0, 8] == 1 and shares[1, :2].tolist() == [0.5, 0.5]
    assert mesh.get_coordinates()[0, 8, 0] == -1  # 0.1 to 1


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
        for read in (plots.plot_norms, optaxclip.diagnose):
            with pytest.raises(ValueError, match=f"{read.__name__}: the history is empty"):
                read(empty)


@pytest.mark.parametrize("prefix", ["watch/", "mine/", "run/0/"])
def test_a_clip_that_does_not_measure_is_drawn_by_what_the_watch_saw(prefix):
    row = {"clip/bound": 1.0, "clip/steps": 1.0}
    watch = {"grad_norm": 3.0, "grad_norm/w": 3.0, "median_ratio": 1.0, "steps": 7.0}
    seen = [row | {prefix + key: x for key, x in watch.items()}]
    assert plots.plot_histogram(seen, bins=1).patches[0].get_height() == 1
    assert [label.get_text() for label in plots.plot_layers(seen).get_yticklabels()] == ["w"]
    assert plots.plot_norms(seen).lines[0].get_ydata().tolist() == [3.0]
    assert len(plots.plot_norms(seen).lines) == 1  # a bound on elements is not a bound on norms
    with pytest.raises(ValueError, match="the clip does not measure: pass it measure=True"):
        plots.plot_norms([row])


def test_whatever_the_prefix_all_is_drawn_and_recommended_from():
    tx = optax.chain(optaxclip.watch(), optaxclip.clip_by_global_norm(1.0))
    grads, rows = {"a": jnp.ones(2), "b": jnp.ones(3)}, {}
    state = tx.init(grads)
    step = jax.jit(lambda s, f: tx.update({"a": f * grads["a"], "b": f * grads["b"]}, s)[1])
    states = [state := step(state, jnp.float32(1 + i % 3)) for i in range(30)]
    for names in ({}, {"prefix": "run/", "watch_prefix": "seen/by/"}):
        rows[len(names)] = [optaxclip.metrics(s, **names) for s in states]
    first, second = (plots.plot_run(rows[n]) for n in rows)
    for a, b in zip(first.axes, second.axes, strict=True):
        assert labels(a) == labels(b)
    assert optaxclip.recommend(rows[0]) == optaxclip.recommend(rows[2])
    assert optaxclip.recommend(rows[2]).layers.keys() == {"a", "b"}
    only = [{k: x for k, x in row.items() if k.startswith("seen")} for row in rows[2]]
    assert optaxclip.recommend(only).thresholds == pytest.approx(
        optaxclip.recommend(rows[0]).thresholds
    )


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
        ValueError, match=f"{draw.__name__}: no '{key}' in the history.*append optaxclip.metrics"
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


def test_a_number_between_two_gaps_is_a_dot_and_ticks_are_steps():
    for ax in (plots.plot_norms(HISTORY[:1]), plots.plot_norms(HISTORY[1:4])):
        assert ax.lines[0].get_marker() == "." and len(ax.lines[0].get_markevery()) in (1, 2)
        ax.figure.canvas.draw()
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert plots.plot_norms(HISTORY[3:]).lines[0].get_marker() == "None"


def test_without_a_norm_there_is_no_colour_bar():
    ax = plots.plot_layers({"a": np.full(3, np.nan), "b": np.zeros(3)})
    assert len(ax.figure.axes) == 1
