"""The examples run and show what they claim, here with few steps and seeds."""

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
    """Runs an example, checks its table and its picture, and returns what `main` returns."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, methods, **options):
        picture = tmp_path / f"{name}.png"
        words = [f"--out={picture}", *(f"--{key}={value}" for key, value in options.items())]
        words += ["--only", *methods] if methods else []
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            results = importlib.import_module(name).main(words)
        assert picture.stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert "Each at its best learning rate" in printed
        assert all(printed.count(method) >= 2 for method in methods)
        return results

    return run


def scores(results):
    first = [runs.scores[0] for runs in results.values()]
    return [np.where(np.isfinite(x), x, np.nan) for x in first]


def test_char_rnn_ends_better_clipped_at_the_same_rate(run):
    results = run("char_rnn", ["no clip", "global norm 1"], steps=100, seeds=2, rates=0.4)
    without, fixed = scores(results)
    assert fixed.max() < 3.2
    assert without.max() > fixed.max() + 0.3


def test_transformer_recovers_only_if_bad_batches_are_skipped(run):
    methods = ["no clip", "skip 20 x the mean"]
    without, skipped = scores(run("transformer", methods, steps=140, seeds=2, rates=0.004))
    assert skipped.max() < 2.9
    assert without.min() > 3.2


def test_cnn_without_normalisers_learns_only_with_agc(run):
    methods = ["no clip", "AGC, not the head"]
    without, clipped = scores(run("cnn_agc", methods, steps=100, seeds=2, rates=0.3))
    assert without.max() < 0.3
    assert clipped.min() > 0.6


def test_pole_stands_longer_with_a_clip_at_a_large_rate(run):
    methods = ["no clip", "global norm 10"]
    without, clipped = scores(run("cartpole", methods, steps=40, seeds=4, rates=0.003))
    assert without.min() < 50
    assert clipped.min() > 100


def test_utterances_are_spelt_better_with_a_clip(run):
    methods = ["no clip", "global norm 5"]
    without, clipped = scores(run("ctc_speech", methods, steps=80, seeds=2, rates=0.1))
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
    methods = ["one device", "FSDP, jit", "FSDP, shard_map", "FSDP, shard_map, Optax"]
    results, distances = run("sharded", methods, steps=20, seeds=1, rates=0.03)
    assert max(distances["FSDP, jit"], distances["FSDP, shard_map"]) < 1e-6
    assert distances["FSDP, shard_map, Optax"] > 1e-3
    assert results["one device"].seen["clip/clipped"].mean() > 0.5


def test_the_gallery_shows_every_example():
    page = (DOCS / "examples.md").read_text()
    tables = {name for name in gallery.NAMES if f"<!-- {name} -->" in page}
    pictures = {name for name in gallery.NAMES if (DOCS / f"images/{name}.png").exists()}
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert tables == pictures == scripts - {"comparison", "data", "multi_host"}


def test_the_gallery_is_what_the_examples_print(tmp_path):
    document = tmp_path / "examples.md"
    document.write_text("before\n<!-- cartpole -->\nyesterday\n<!-- end cartpole -->\nafter\n")
    words = ["--into", str(document), "--pictures", str(tmp_path)]
    gallery.main(["--small", "--only", "cartpole", *words])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "yesterday" not in text
    assert text.count("| no clip ") == 2 and (tmp_path / "cartpole.png").exists()
