"""The examples run, and show what they claim. They are small here; users run them at full size."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from tests.benchmarks import gallery

pytestmark = pytest.mark.slow
EXAMPLES, DOCS = (pathlib.Path(__file__).parent.parent / name for name in ("examples", "docs"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example with few steps; returns what its `main` does, having looked at its table and
    its picture.
    """
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, methods, **options):
        picture = tmp_path / f"{name}.png"
        words = [f"--{key}={value}" for key, value in options.items()] + (
            ["--only", *methods] if methods else []
        )
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = importlib.import_module(name).main([f"--out={picture}", *words])
        assert picture.stat().st_size > 10_000
        said = capsys.readouterr().out
        assert "Each at its best learning rate" in said
        assert all(said.count(method) >= 2 for method in methods)
        return found

    return run


def scores(results):
    return [
        np.where(np.isfinite(runs.scores[0]), runs.scores[0], np.nan) for runs in results.values()
    ]


def test_char_rnn_ends_better_clipped_at_the_same_rate(run):
    without, fixed = scores(
        run("char_rnn", ["no clip", "global norm 1"], steps=100, seeds=2, rates=0.4)
    )
    assert fixed.max() < 3.2
    assert without.max() > fixed.max() + 0.3


def test_transformer_recovers_only_if_bad_batches_are_skipped(run):
    found = run("transformer", ["no clip", "skip 20 x the mean"], steps=140, seeds=2, rates=0.004)
    without, skipped = scores(found)
    assert skipped.max() < 2.9
    assert without.min() > 3.2


def test_cnn_without_normalisers_learns_only_with_agc(run):
    without, clipped = scores(
        run("cnn_agc", ["no clip", "AGC, not the head"], steps=100, seeds=2, rates=0.3)
    )
    assert without.max() < 0.3
    assert clipped.min() > 0.6


def test_pole_stands_longer_with_a_clip_at_a_large_rate(run):
    without, clipped = scores(
        run("cartpole", ["no clip", "global norm 10"], steps=40, seeds=4, rates=0.003)
    )
    assert without.min() < 50
    assert clipped.min() > 100


def test_utterances_are_spelt_better_with_a_clip(run):
    without, clipped = scores(
        run("ctc_speech", ["no clip", "global norm 5"], steps=80, seeds=2, rates=0.1)
    )
    assert clipped.max() < without.min() - 0.5


def test_private_digits_are_learned_and_too_large_a_bound_buys_noise(run):
    found = run("private_digits", ["clip 1", "clip 10", "AUTO-S"], steps=30, seeds=2, rates=1)
    fitting, large, auto = map(np.median, scores(found))
    assert min(fitting, auto) > 0.8
    assert large < fitting


def test_federated_bound_finds_the_median_by_itself(run):
    found = run("federated", ["bound 10", "median, from 10"], steps=50, seeds=2, rates=1)
    large, median = scores(found)
    assert median.min() > large.max() + 0.1
    share = found["median, from 10"].seen["share clipped"][0, :, -20:].mean()
    assert 0.3 < share < 0.7


def test_tuned_threshold_is_better_than_the_habitual_one_on_other_seeds(run):
    without, habit, tuned = scores(run("tune_threshold", [], steps=30, seeds=4, rates=0.003))
    assert np.median(tuned) > np.median(habit) + 20
    assert tuned.min() > without.min()


def test_sharded_runs_end_where_one_device_does_except_with_a_local_norm(run):
    results, away = run(
        "sharded",
        [
            "no clip, one device",
            "one device",
            "FSDP, jit",
            "FSDP, shard_map",
            "FSDP, shard_map, Optax",
        ],
        steps=20,
        seeds=1,
        rates=0.03,
    )
    assert max(away["FSDP, jit"], away["FSDP, shard_map"]) < 1e-6
    assert away["FSDP, shard_map, Optax"] > 1e-3
    assert results["one device"].seen["clip/clipped"].mean() > 0.5


def test_the_gallery_shows_every_example():
    page = (DOCS / "examples.md").read_text()
    shown = {
        name
        for name in gallery.NAMES
        if f"<!-- {name} -->" in page and (DOCS / f"images/{name}.png").exists()
    }
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert shown == set(gallery.NAMES) == scripts - {"comparison", "data", "multi_host"}


def test_the_gallery_is_what_the_examples_print(tmp_path):
    document = tmp_path / "examples.md"
    document.write_text("before\n<!-- cartpole -->\nyesterday\n<!-- end cartpole -->\nafter\n")
    gallery.main(
        ["--small", "--only", "cartpole", "--into", str(document), "--pictures", str(tmp_path)]
    )
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    assert text.count("| no clip ") == 2 and (tmp_path / "cartpole.png").exists()
