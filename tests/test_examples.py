"""The examples run, and show what they claim. Small here; a user runs them at full size."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_char_rnn_trains_better_clipped_at_the_same_rate(tmp_path, capsys):
    picture = tmp_path / "char_rnn.png"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        losses = load("char_rnn").main(["--steps", "120", "--rates", "0.4", "--out", str(picture)])
    worst = {name: loss.max() for name, loss in losses.items()}
    assert np.isfinite(worst["global norm 1"]) and worst["global norm 1"] < 3.2
    assert worst["1.5 x the mean"] < 3.2
    assert worst["no clip"] > worst["global norm 1"] + 0.3
    assert picture.stat().st_size > 10_000
    assert "diverged" in capsys.readouterr().out


@pytest.mark.slow
def test_private_digits_are_learned_and_too_large_a_bound_buys_noise(tmp_path, capsys):
    picture = tmp_path / "private_digits.png"
    options = ["--steps", "30", "--seeds", "2", "--rates", "1", "--out", str(picture)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        scores = load("private_digits").main(options)
    medians = {name: np.median(score) for name, score in scores.items()}
    assert min(medians["clip 0.1"], medians["clip 1"], medians["AUTO-S"]) > 0.8
    assert medians["clip 10"] < medians["clip 1"] < medians["no clip, no noise"]
    assert picture.stat().st_size > 10_000
    assert "epsilon" in capsys.readouterr().out
