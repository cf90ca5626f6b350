"""What is asked of every project, in the environment of that project.

A client says how the project trains with a given optimizer; `check` trains with Optax's clip and
with ours in its place, and prints what came out as one line of JSON.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optaxclip as oc


class Trained(NamedTuple):
    """What the project returned.

    Attributes:
      losses: of each step or epoch, or what else it reports of how it trained.
      state: what holds the optimizer's state; None where the project returns none.
    """

    losses: Any
    state: Any = None


Train = Callable[[optax.GradientTransformation], Trained]


def check(
    train: Train,
    optimizer: optax.GradientTransformation,
    bound: float,
    *,
    theirs: Train | None = None,
    axis_names: Any = None,
    rtol: float = 1e-9,
) -> None:
    """Trains with both clips, then with the watch and the wrapper, and prints what was seen.

    Args:
      train: trains with an optimizer, from the same start each time.
      optimizer: what follows the clip.
      bound: one that clips some of the steps.
      theirs: trains with the clip that the project itself has, where it has one by example.
      axis_names: for our clips, where the project trains in `pmap`.
      rtol: how far the losses may be apart. Sums in another order differ in their last bits, which
        a long training enlarges.
    """
    clip = oc.clip_by_global_norm(bound, axis_names=axis_names)
    watch = oc.watch(axis_names=axis_names)
    zclip = oc.zclip(warmup_steps=5, axis_names=axis_names)
    want = _train(theirs or train, optax.chain(optax.clip_by_global_norm(bound), optimizer))
    # Losses that no clip changes, or none at all, would be the same with any clip.
    unclipped = _train(train, optimizer).losses
    assert not np.allclose(want.losses, unclipped, rtol=1e-3), "the bound changes no loss"

    read = functools.partial(_train_and_read, train, reports=want.state is None)
    ours, seen = read(optax.chain(clip, optimizer))
    np.testing.assert_allclose(ours.losses, want.losses, rtol=rtol)
    assert seen["clip/steps"] > 0 and 0 < seen["clip/clipped_fraction"] <= 1, seen

    whole, row = read(oc.skip_nonfinite(optax.chain(watch, clip, optimizer), axis_names=axis_names))
    np.testing.assert_allclose(whole.losses, want.losses, rtol=rtol)
    assert row["clip/steps"] == row["watch/steps"] == seen["clip/steps"], row
    assert row["skip/steps"] == 0 and np.isfinite(row["watch/grad_norm"]), row

    adaptive, row = read(optax.chain(zclip, optimizer))
    assert np.isfinite(adaptive.losses).all() and row["clip/steps"] == seen["clip/steps"], row
    _tell(want, ours, seen)


def _train(train: Train, optimizer) -> Trained:
    trained = train(optimizer)
    return trained._replace(losses=np.asarray(trained.losses))


def _train_and_read(train: Train, optimizer, reports: bool) -> tuple[Trained, dict[str, float]]:
    """Also the metrics of the last step: of the state, or where none comes out as reported."""
    rows: list[dict[str, float]] = []
    if reports:
        optimizer = oc.report(optimizer, lambda step, row: rows.append(row), every=1)
    trained = _train(train, optimizer)
    jax.effects_barrier()
    if reports:
        return trained, max(rows, key=lambda row: row["clip/steps"])
    seen = jax.device_get(oc.metrics(trained.state))
    return trained, {key: float(np.mean(x)) for key, x in seen.items()}


def _tell(want: Trained, ours: Trained, seen: dict[str, float]) -> None:
    facts = {
        "jax": jax.__version__,
        "losses": want.losses.size,
        "apart": float(np.max(np.abs(ours.losses / want.losses - 1))),
        "steps": seen["clip/steps"],
        "clipped": seen["clip/clipped_fraction"],
        "reports": want.state is None,
    }
    print(json.dumps(facts))
