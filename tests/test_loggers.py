"""Runs the examples in docs/watching.md whose loggers may not be installed."""

import csv
import io
import pathlib
import re
import textwrap
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc
from optaxclip import loggers

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "watching.md").read_text()


@pytest.fixture
def row():
    tx = optax.chain(oc.watch(), oc.clip_by_global_norm(1.0))
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    return {name: float(x) for name, x in jax.jit(oc.metrics)(state).items()}


def block(word):
    """The only block of the page with this word, among those that are not run as doctests."""
    (found,) = [text for text in re.findall(r"```py\n(.*?)```", PAGE, re.S) if word in text]
    return textwrap.dedent(found)


def run(word, **names):
    exec(block(word), names)
    return names


@pytest.mark.filterwarnings("ignore")  # tensorboardX's own warnings
def test_tensorboard(row, tmp_path):
    tensorboard = pytest.importorskip("tensorboardX", exc_type=ImportError)
    names = {"loggers": loggers, "row": row, "step": 3, "folder": str(tmp_path)}
    run("SummaryWriter", tensorboardX=tensorboard, **names)
    (events,) = tmp_path.glob("events*")
    content = events.read_bytes()
    assert all(
        name.encode() in content
        for name in ("watch/grad_norm/a", "clip/factor", "watch/would_clip/z2.5")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb(row, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    run("wandb.init", wandb=wandb, loggers=loggers, row=row, step=3, folder=str(tmp_path))
    wandb.teardown()  # its service writes the file later, with more delay on a busy machine
    (log,) = tmp_path.rglob("*.wandb")
    assert b"watch/grad_norm/a" in log.read_bytes()


def test_histograms_go_to_tensorboard_over_powers_of_ten():
    seen = []
    writer = types.SimpleNamespace(add_histogram_raw=lambda tag, **raw: seen.append((tag, raw)))
    tx = oc.watch(histogram=True)
    grads = {"a": jnp.array([0.0, 0.5, 5.0, 5.0])}
    _, state = tx.update(grads, tx.init(grads))
    loggers.to_tensorboard(writer)(3, loggers.histograms(state).counts)
    ((tag, raw),) = seen
    assert (tag, raw["num"], raw["global_step"]) == ("a", 4, 3)
    counted = dict(zip(raw["bucket_limits"], raw["bucket_counts"], strict=True))
    assert {limit: n for limit, n in counted.items() if n} == {-8: 1, 0: 1, 1: 2}
    assert raw["sum"] == pytest.approx(-8.5 - 0.5 + 2 * 0.5)


def test_progress(row, capsys):
    run("tqdm", tqdm=pytest.importorskip("tqdm"), loggers=loggers, row=row)
    assert "norm=2.24, bound=1.0, clipped=100 %" in capsys.readouterr().err


def test_csv_has_the_columns_of_the_first_row(row):
    file = io.StringIO()
    log = loggers.to_csv(file)
    log(1, row)
    log(2, {"clip/bound": jnp.float32(0.5), "other": 1.0})
    first, second = csv.DictReader(io.StringIO(file.getvalue()))
    assert first.keys() == {"step", *row} and float(first["clip/steps"]) == 1
    assert (second["step"], second["clip/bound"], second["clip/factor"]) == ("2", "0.5", "")


def test_clu():
    seen = []
    writer = types.SimpleNamespace(write_scalars=lambda *both: seen.append(both))
    loggers.to_clu(writer)(3, {"clip/bound": jnp.float32(0.5), "counts": jnp.ones(2)})
    assert seen == [(3, {"clip/bound": 0.5})]


def test_a_progress_bar_accepts_any_prefix():
    tx = oc.skip_nonfinite(optax.chain(oc.clip_by_global_norm(4.0), oc.watch()))
    grads = {"a": jnp.array([3.0, 4.0])}
    _, state = tx.update(grads, tx.init(grads))
    _, state = tx.update({"a": jnp.array([jnp.nan, 4.0])}, state)
    shown = loggers.postfix(oc.metrics(state, prefix="run/", watch_prefix="w/", skip_prefix="s/"))
    assert shown == {"norm": "4.0", "bound": "4.0", "clipped": "100 %", "skipped": "1"}
    assert loggers.postfix({"loss": float("nan"), "clip/nonfinite_steps": 2}) == {
        "loss": "nan",
        "nonfinite": "2",
    }


def test_nnx(row):
    nnx = pytest.importorskip("flax.nnx")
    with jax.numpy_dtype_promotion("standard"):
        found = run("MultiMetric", nnx=nnx, row=row)["means"].compute()
    assert float(found["watch_grad_norm_a"]) == pytest.approx(row["watch/grad_norm/a"])
    assert len(found) == len(row)
