"""The scripts behind the numbers in the documents run; what they measure is not judged here."""

import jax
import pytest

from tests.benchmarks import choosing, frontpage, robustness, speed, tuning, watching

PAGES = "docs/performance.md", "README.md"
QUOTES = ("a", 0, True), ("a", 1), ("b", 0), ("b", 0, True), ("c", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["digits_cnn", "cartpole"]
)  # the others train in the tests of examples and of tuning
def test_every_task_trains_and_is_reported(task, tmp_path, capsys):
    document = tmp_path / "choosing.md"
    document.write_text("before\n<!-- results -->\nyesterday\n<!-- end results -->\nafter\n")
    runs = ["--tasks", task, "--methods", "zclip", "--steps", "2", "--seeds", "1"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        choosing.main([*runs, "--into", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| `zclip` |"))
    assert row.count("|") == len(choosing.HEAD) + 1
    written = text.split("<!-- results -->")[1].split("<!-- end results -->")[0]
    assert written.strip().endswith(capsys.readouterr().out.strip())


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
    told = readme.split("<!-- cost -->")[1].split("<!-- end cost -->")[0].split("\n")
    rows = [line for line in told if line.startswith("| ")]
    # Of what is not written there yet nothing is quoted.
    assert len(rows) > 3 and set(rows) <= set(frontpage.cost(page).split("\n"))


def test_a_quote_is_read_from_any_table():
    """With numbers beside the first row, or as they are; with rows that nobody asked for."""
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


def test_a_poisoned_peer_is_seen():
    """The measure itself: a running mean that a NaN gets into never comes back, one that it does
    not never leaves.
    """
    bounds = robustness.np.ones((50, 1))
    poison = robustness.POISONS["NaN first"]
    assert robustness.near(bounds, bounds, poison) == 0
    assert robustness.near(bounds * robustness.np.nan, bounds, poison) == float("inf")
    bounds = bounds.copy()
    bounds[:30] = 4.0
    assert robustness.near(bounds, robustness.np.ones((50, 1)), poison) == 30 - 10
    assert "| never |" in robustness.table({"x": [float("inf")]})


@pytest.mark.slow
def test_the_tuned_threshold_is_judged_on_other_seeds(tmp_path, capsys):
    document, picture = tmp_path / "tuning.md", tmp_path / "tuning.png"
    document.write_text("before\n<!-- results -->\nyesterday\n<!-- end results -->\nafter\n")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tuning.main(
            ["--small", "--tasks", "char_rnn", "--into", str(document), "--picture", str(picture)]
        )
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
    assert (
        len(lines) == 2 + len(watching.CHAINS) + len(watching.EVERY)
        and len({line.count("|") for line in lines}) == 1
    )
