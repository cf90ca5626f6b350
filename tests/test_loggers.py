"""The lines of docs/watching.md for loggers that may not be installed are run here."""

import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "watching.md").read_text()


@pytest.fixture
def row():
    tx = optax.chain(oc.watch(), oc.clip_by_global_norm(1.0))
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    return {name: float(x) for name, x in jax.jit(oc.metrics)(state).items()}


def block(word):
    """The one block of the page, of those that are not run by themselves, that this word is in."""
    (found,) = [text for text in re.findall(r"```py\n(.*?)```", PAGE, re.S) if word in text]
    return textwrap.dedent(found)


def run(word, **names):
    exec(block(word), names)
    return names


@pytest.mark.filterwarnings("ignore")  # what tensorboardX warns of is not ours
def test_tensorboard(row, tmp_path):
    tensorboard = pytest.importorskip("tensorboardX", exc_type=ImportError)
    run("SummaryWriter", tensorboardX=tensorboard, row=row, folder=str(tmp_path))
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
    run("wandb.init", wandb=wandb, row=row, folder=str(tmp_path))
    wandb.teardown()  # its service writes the file in its own time, later on a busy machine
    (log,) = tmp_path.rglob("*.wandb")
    assert b"watch/grad_norm/a" in log.read_bytes()


def test_nnx(row):
    nnx = pytest.importorskip("flax.nnx")
    with jax.numpy_dtype_promotion("standard"):
        found = run("MultiMetric", nnx=nnx, row=row)["means"].compute()
    assert float(found["watch_grad_norm_a"]) == pytest.approx(row["watch/grad_norm/a"])
    assert len(found) == len(row)
