"""The scripts behind the numbers in the docs run. What they measure is not judged here."""

import jax
import numpy as np
import pytest

from tests.benchmarks import choosing, frontpage, robustness, speed, tuning, watching
from tests.benchmarks import choosing_tables as tables
from tests.benchmarks.speech import make_utterances

PAGES = "docs/performance.md", "README.md"
MARKS = "summary", "results"
QUOTES = ("a", 0, True), ("a", 1), ("b", 0), ("b", 0, True), ("c", 0)


@pytest.mark.slow
# The other tasks are trained in the tests of examples and of tuning.
@pytest.mark.parametrize("task", ["digits_cnn", "cartpole", "speech"])
def test_every_task_is_trained_once_and_reported(task, tmp_path, capsys, monkeypatch):
    document, name = tmp_path / "choosing.md", choosing.REFERENCE
    runs = ["--tasks", task, "--methods", name, "--steps", "2", "--seeds", "3"]
    runs += ["--into", str(document), "--kept", str(tmp_path / "new" / "runs.jsonl")]
    # With two settings, choosing and judging have the same number of runs, so a task compiles once.
    few = choosing.METHODS[name]._replace(settings=(1.0, 0.1))
    monkeypatch.setattr(choosing, "METHODS", {name: few})
    texts = []
    for _ in range(2):
        marks = [f"<!-- {mark} -->\nyesterday\n<!-- end {mark} -->\n" for mark in MARKS]
        document.write_text(f"before\n{'and'.join(marks)}after\n")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            choosing.main(runs)
        texts.append(document.read_text())
        monkeypatch.setattr(choosing, "measure", None)
    text = texts[0]
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert rows == [len(tables.TOTALS) + 1, len(tables.HEAD) + 1, len(tables.HEAD) + 1]
    written = [text.split(f"<!-- {mark} -->")[1].split("<!-- end")[0].strip() for mark in MARKS]
    assert texts[1] == text and capsys.readouterr().out.strip().endswith("\n\n".join(written))


def test_a_difference_is_within_noise_if_its_interval_contains_zero():
    """Compares the interval with the normal one of a mean, and pairs that hardly differ."""
    seeds = np.random.default_rng(1).normal(2.0, 0.3, 60)
    low, high = tables.bootstrap(seeds)
    half = 1.96 * seeds.std() / np.sqrt(seeds.size)
    np.testing.assert_allclose([low, high], seeds.mean() + np.array([-half, half]), atol=0.02)
    noise = np.tile([0.01, -0.01], 30)
    found = [tables.name_verdict(seeds + shift + noise, seeds) for shift in (-0.1, 0.0, 0.1)]
    assert found == ["better", "alike", "worse"]
    assert tables.compare(seeds + noise, seeds) == "≈ +0.00 (+0.00 to +0.00)"
    assert tables.compare(seeds + 0.1, seeds) == "+0.10 (+0.10 to +0.10)"


def test_a_lost_run_counts_as_one_that_learned_nothing():
    runs = [[1.0, 1.5], [2.0, 2.5], [np.nan, np.inf], [0.5, 4.0], [0.1, 0.2], [0.3, 0.4]]
    judged = tables.judge({"judged": runs, "usual": 1}, failed=3.0)
    assert judged["clean"].default.tolist() == [2.0, 2.5]
    assert judged["clean"].tuned.tolist() == [0.5, 3.0]
    assert judged["clean"].all.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert judged["bad"].default.tolist() == judged["bad"].all.tolist() == [0.1, 0.2]
    assert judged["bad"].tuned.tolist() == [0.3, 0.4]


def test_digits_are_spoken_long_enough_for_their_labels():
    heard, padding, digits = make_utterances(4)
    frames = (1 - padding).sum(axis=1)
    assert (np.diff(padding, axis=1) >= 0).all() and (frames >= 2 * digits.shape[1]).all()
    # Frames with speech are louder than those without.
    assert heard[padding == 0].mean() > heard[:, 0].mean() + 0.5
    assert set(digits.ravel()) <= set(range(10)) and np.isfinite(heard).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "percentiles"])
def test_speed_is_measured_and_put_into_the_document(name, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n<!-- {name} -->\nyesterday\n<!-- end {name} -->\nafter\n")
    speed.main(["--small", "--only", name, "--into", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    assert f"jax {jax.__version__}" in text and text.count("|---") >= 2


def test_the_first_page_quotes_the_page_of_performance():
    page, readme = ((frontpage.ROOT / name).read_text() for name in PAGES)
    quoted = readme.split("<!-- cost -->")[1].split("<!-- end cost -->")[0].split("\n")
    rows = [line for line in quoted if line.startswith("| ")]
    # Nothing is quoted that is not written there.
    assert len(rows) > 3 and set(rows) <= set(frontpage.quote_costs(page).split("\n"))


def test_a_quote_is_read_from_any_table():
    """Numbers are differences from the first row or plain, among rows that are not quoted."""
    added = "|---|\n| no clip | 1.00 (1-1) | 40.0 |\n| clip | 1.0 (1-1) | +0.0 |\n"
    added += "| Optax's global norm | 2.47 (2-3) | +20.0 |\n| global norm | 1.12 (1-1) | +4.0 |\n"
    plain = "| | k |\n|---|---|\n| no clip | 1,150 |\n| optax.clip_by_global_norm | 2,300 |\n"
    plain += "| clip_by_global_norm | 1,173 (0.51) |\n"
    heads = [f"### {name}, float32 gradients\n\n" for name in ("a", "b")]
    page = f"{heads[0]}{added}\n{heads[1]}{plain}\n<!-- end -->\n| no clip | 7 |\n"
    read = [frontpage.read(page, frontpage.Quote("", *quote)) for quote in QUOTES]
    assert read[0] == ["1.00", "2.47", "1.12"] and read[1] == ["40", "60", "44"]
    assert read[2] == ["1,150", "2,300", "1,173"] and read[3] == ["1.00", "2.00", "1.02"]
    assert read[4] == []


def test_a_poisoned_peer_is_detected():
    """Tests the measure on bounds that are near at once, never, and after a while."""
    bounds = robustness.np.ones((50, 1))
    poison = robustness.POISONS["NaN first"]
    assert robustness.near(bounds, bounds, poison) == 0
    assert robustness.near(bounds * robustness.np.nan, bounds, poison) == float("inf")
    bounds = bounds.copy()
    bounds[:30] = 4.0
    assert robustness.near(bounds, robustness.np.ones((50, 1)), poison) == 30 - 10
    assert "| never |" in robustness.format_table({"x": [float("inf")]})


@pytest.mark.slow
def test_the_tuned_threshold_is_evaluated_on_other_seeds(tmp_path, capsys):
    document, picture = tmp_path / "tuning.md", tmp_path / "tuning.png"
    document.write_text("before\n<!-- results -->\nyesterday\n<!-- end results -->\nafter\n")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        words = ["--tasks", "char_rnn", "--into", str(document), "--picture", str(picture)]
        tuning.main(["--small", *words])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    rows = [line for line in text.splitlines() if line.startswith("| character RNN |")]
    assert len(rows) == 6 and "no clip" in rows[-1] and picture.stat().st_size < 80_000
    assert "| value | final loss: median |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cost_of_a_watch_is_reported(capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        watching.main(["--small", "--models", "cnn"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(watching.CHAINS) + len(watching.EVERY)
    assert len({line.count("|") for line in lines}) == 1
