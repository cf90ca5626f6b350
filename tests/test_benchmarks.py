"""The scripts behind the numbers in the documents run; what they measure is not judged here."""

import jax
import pytest

from tests.benchmarks import choosing, robustness, watching


@pytest.mark.slow
@pytest.mark.parametrize("task", choosing.TRAININGS)
def test_every_task_trains_and_is_reported(task, tmp_path, capsys):
    document = tmp_path / "choosing.md"
    document.write_text("before\n<!-- results -->\nyesterday\n<!-- end -->\nafter\n")
    runs = ["--tasks", task, "--methods", "no clip", "zclip", "--steps", "2", "--seeds", "1"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        choosing.main([*runs, "--into", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| `zclip` |"))
    assert row.count("|") == len(choosing.HEAD) + 1
    assert text.split("<!-- results -->")[1].split("<!-- end -->")[0].strip().endswith(capsys.readouterr().out.strip())


def test_a_poisoned_peer_is_seen():
    """The measure itself: a running mean that a NaN gets into never comes back, one that it does not never leaves."""
    bounds = robustness.np.ones((50, 1))
    poison = robustness.POISONS["NaN first"]
    assert robustness.near(bounds, bounds, poison) == 0
    assert robustness.near(bounds * robustness.np.nan, bounds, poison) == float("inf")
    bounds = bounds.copy()
    bounds[:30] = 4.0
    assert robustness.near(bounds, robustness.np.ones((50, 1)), poison) == 30 - 10
    assert "| never |" in robustness.table({"x": [float("inf")]})


@pytest.mark.slow
def test_the_cost_of_a_watch_is_reported(capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        watching.main(["--small", "--models", "cnn"])
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2 + len(watching.CHAINS) + len(watching.EVERY) and len({line.count("|") for line in lines}) == 1
    )
