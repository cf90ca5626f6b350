"""How results are displayed in a terminal and in a notebook."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.monitoring.display import sparkline
from optaxclip.tuning import Sweep

GRADS = {"w": jnp.array([30.0, 40.0])}


def explained():
    tx = optax.chain(oc.watch(), oc.clip_by_global_norm(1.0))
    return oc.explain(tx.update(GRADS, tx.init(GRADS))[1], GRADS)


def recorded():
    history = oc.History()
    for norm in (1.0, 50.0, float("nan"), 2.0):
        history.append({"clip/grad_norm": norm}, loss=1 / norm)
    return history


def swept():
    final, runs = np.array([[3.0, 3.1], [1.0, 1.1], [9.0, np.nan]]), np.zeros((3, 2, 5))
    return Sweep(np.array([0.1, 1.0, np.inf]), np.arange(2), final, runs, runs, runs, 4.0, np.inf)


NORMS = np.random.default_rng(0).lognormal(0.0, 0.2, (200, 2))
BAD_CHAIN = optax.chain(optax.adam(1e-3), oc.clip_by_global_norm(1.0))
SHOWN = {
    "sweep": (swept, "| 1 | 1.05 | 1 to 1.1 | 0% | 0% |", "| **1** | **1.05** |"),
    "recommendation": (lambda: oc.recommend(NORMS), "- steady: the norms", "| `1` | "),
    "signs": (
        lambda: oc.diagnose({"clip/grad_norm": 1.2 ** np.arange(40)}),
        "norms-exploding: ",
        "- **norms-exploding**: ",
    ),
    "findings": (
        lambda: oc.check(BAD_CHAIN, GRADS),
        "clip-after-normaliser, at chain[1]",
        "- **clip-after-normaliser**, at `chain[1]",
    ),
    "nothing": (lambda: oc.check(optax.sgd(0.1), GRADS), "nothing found", "nothing found"),
    "explain": (explained, "step 1: norm 50", "- **step 1**: norm 50"),
    "history": (recorded, "clip/grad_norm   2.0", "| `clip/grad_norm` | 2.0 | 1.0 | 50 | ▁█·▁ |"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_result_shows_itself(name):
    make, text, markdown = SHOWN[name]
    shown = make()
    assert text in repr(shown) and repr(shown) == str(shown)
    assert markdown in shown._repr_markdown_()


@pytest.mark.parametrize("name", SHOWN)
def test_in_a_notebook_tables_are_tables(name):
    """Each row of a table has as many cells as its head, whatever names it contains."""
    rows = [x for x in SHOWN[name][0]()._repr_markdown_().splitlines() if x.startswith("| ")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1


def test_an_empty_history_says_so():
    assert repr(oc.History()) == "History without a step" == oc.History()._repr_markdown_()


def test_many_keys_are_cut_to_one_screen():
    history = oc.History()
    history.append({f"clip/grad_norm/{i}": 1.0 for i in range(60)})
    assert repr(history).endswith("and 20 more keys") and repr(history).count("\n") == 42


@pytest.mark.parametrize(
    ("series", "bars"),
    [
        ([], ""),
        ([np.nan], "·"),
        ([5.0, 5.0], "▁▁"),
        ([0.0, 7.0, np.inf], "▁█·"),
        ([1.0, 1e3, 1e6], "▁▅█"),
        ([-1e6, 0.0, 1e6], "▁▅█"),
    ],
)
def test_a_sparkline_is_a_bar_for_each_stretch(series, bars):
    assert sparkline(np.array(series)) == bars


def test_a_sparkline_keeps_the_spike_of_a_long_run():
    series = np.ones(10_000)
    series[4321] = 50.0
    assert "█" in sparkline(series) and len(sparkline(series)) == 24
