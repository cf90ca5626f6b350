"""The scripts behind the numbers in the documents run; what they measure is not judged here."""

import jax
import pytest

from tests.benchmarks import choosing, robustness, speed, tuning, watching


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
