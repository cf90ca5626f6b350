"""What `explain` says about clips, watches and skip wrappers; it names the planted culprit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import actions

PARAMS = {
    "decoder": {"layers": [{"attn": {"kernel": jnp.full((2, 2), 0.5)}} for _ in range(4)]},
    "embed": jnp.ones(2),
}


def grads_of(factor, culprit=1.0):
    grads = jax.tree.map(lambda p: p * factor, PARAMS)
    grads["decoder"]["layers"][3]["attn"]["kernel"] *= culprit
    return grads


def explained(tx, *steps, params=None):
    """What `explain` says after steps, each a factor, or a factor and one for the culprit."""
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in steps:
        _, state = update(grads_of(*np.atleast_1d(step).astype(np.float32)), state, PARAMS)
    return oc.explain(state, params)


USUAL = [1.0, 1.1, 0.9] * 5
CLIP = oc.clip_by_global_norm(1.0)


def test_the_sentence_of_the_readme():
    text = explained(optax.chain(oc.watch(), CLIP), *USUAL, (1.0, 30.0)).splitlines()
    head, tail = text[0].split(" x the median; ")
    assert head.startswith("step 16: norm 30.1 = 1")
    assert tail == "99 % of it in decoder/layers/3/attn/kernel; clipped to 1.0 (16 of 16 steps)"
    assert text[1].startswith("bad: step 16: norm 30.1 = ")
    assert (
        text[2].startswith("recent norms: 50 % below ") and "5 % below 0" not in text[2]
    )  # the others wait
    later = explained(optax.chain(oc.watch(), CLIP), *USUAL, *USUAL).splitlines()
    assert later[1].startswith("recent norms: 5 % below 2.") and "95 % below 2." in later[1]
    assert text[3].startswith("would have clipped of 16 steps: 100 % at 0.1, 100 % at 0.5")


def test_a_clip_without_a_watch():
    assert explained(CLIP) == "no step yet"
    assert explained(CLIP, 1.0) == "step 1: norm 2.45; clipped to 1.0 (1 of 1 steps)"
    assert explained(CLIP, 1.0, 0.1) == "step 2: norm 0.245; not clipped: within 1.0 (1 of 2 steps)"
    assert explained(oc.zclip(), 1.0) == "step 1: norm 2.45; not clipped: no bound (0 of 1 steps)"
    assert (
        explained(CLIP, jnp.nan)
        == "step 1: the norm is not finite; set to NaN (0 of 1 steps, 1 not finite)"
    )
    zero = oc.clip_by_global_norm(1.0, nonfinite="zero")
    assert explained(zero, jnp.inf).startswith("step 1: the norm is not finite; set to zero")
    assert "scaled to 1.0" in explained(oc.clip_by(1.0, action=actions.normalize), 0.1)
    assert "of units or elements clipped" in explained(oc.clip(0.7, measure=True), 1.0)
    assert (
        explained(oc.clip(0.7), 1.0)
        == "step 1: bound 0.7; it does not measure what it clips (see its argument measure=)"
    )
    both = explained(optax.chain(oc.watch(), oc.clip(0.7)), 1.0).splitlines()
    assert both[0].startswith("step 1: norm 2.45; 33 %") and "does not measure" in both[1]


def test_a_clip_of_blocks_names_the_block():
    text = explained(oc.clip_by_leaf_norm(2.0), (1.0, 10.0))
    what = "step 1: norm 10 in decoder/layers/3/attn/kernel, the largest of 5;"
    assert (
        text
        == what + " 1 of 5 blocks clipped, most decoder/layers/3/attn/kernel, to 2.0 (1 of 1 steps)"
    )
    assert "nothing clipped" in explained(oc.clip_by_leaf_norm(20.0), 1.0)
    assert "in 1 of 5 blocks, first in decoder/layers/3" in explained(
        oc.clip_by_leaf_norm(2.0), (1.0, jnp.nan)
    )


def test_steps_that_are_not_finite():
    tx = optax.chain(oc.watch(), CLIP)
    assert (
        "not finite in 1 of 5 blocks, first in decoder/layers/3/attn/kernel; set to NaN"
        in explained(tx, (1.0, jnp.inf))
    )
    assert "not finite in all 5 blocks: either the loss is not finite, or embed" in explained(
        tx, jnp.nan
    )


def test_gradients_of_zero_and_a_run_in_which_nothing_is_applied():
    assert "all gradients are zero; not clipped" in explained(CLIP, 0.0)
    assert explained(oc.watch(), 1.0, 0.0).startswith("step 2: all gradients are zero")
    never = explained(oc.skip_spikes(optax.sgd(0.1), 0.1), *USUAL)
    assert never.endswith(
        "(15 of 15 steps skipped, 15 consecutive): no update has been applied yet"
    )


def test_a_watch_alone_and_after():
    assert explained(oc.watch(), 1.0).startswith("step 1: norm 2.45; 33 % of it in embed")
    assert explained(oc.watch()).endswith("no step seen yet")
    assert "NaN" not in explained(oc.watch(), 0.0)
    text = explained(
        optax.chain(CLIP, oc.watch()), 1.0
    )  # after the clip it sees other norms: two lines
    assert (
        text.splitlines()[0].startswith("step 1: norm 2.45; clipped")
        and "step 1: norm 1.0; 33 %" in text
    )


def test_wrappers_that_skip():
    tx = optax.chain(oc.watch(), oc.skip_spikes(optax.sgd(0.1), 10.0))
    assert "step taken (0 of 15 steps skipped)" in explained(tx, *USUAL)
    assert "kernel; step skipped, over 10 (1 of 16 steps skipped, 1 consecutive)" in explained(
        tx, *USUAL, (1.0, 30.0)
    )
    inside = explained(
        oc.skip_spikes(optax.chain(oc.watch(), CLIP, optax.sgd(0.1)), 10.0), *USUAL, (1.0, 30.0)
    ).splitlines()
    assert inside[0].startswith("step 16: norm 30.1; step skipped") and inside[1].startswith(
        "step 15:"
    )
    nan = explained(oc.skip_nonfinite(optax.sgd(0.1)), 1.0, jnp.nan)
    assert (
        nan == "step 2: the norm is not finite; step skipped (1 of 2 steps skipped, 1 consecutive)"
    )
    tx = oc.skip_spikes(optax.sgd(0.1), jnp.inf, loss_threshold=1.0)
    _, state = tx.update(PARAMS, tx.init(PARAMS), loss=2.0)
    assert "skipped because of its loss" in oc.explain(state)
    _, state = tx.update(PARAMS, tx.init(PARAMS), loss=jnp.nan)
    assert "skipped: the loss is not finite" in oc.explain(state)
    twice = explained(
        oc.skip_nonfinite(oc.skip_spikes(optax.chain(CLIP, CLIP), 10.0)), 1.0
    ).splitlines()
    assert [line.split(":")[0] for line in twice] == ["skip/0", "skip/1", "clip/0", "clip/1"]


def test_parameters():
    assert explained(CLIP, 1.0, params=PARAMS).splitlines()[1] == "parameters: norm 2.45"
    lost = PARAMS | {"embed": jnp.array([1.0, jnp.nan])}
    assert "not finite in 1 of 5 leaves, first in embed" in explained(CLIP, 1.0, params=lost)


def test_nothing_and_too_much():
    adam = "ScaleByAdamState of optax.scale_by_adam"
    searched = f"no clip, watch or skip wrapper of optaxclip in ({adam}, EmptyState)"
    nothing = f"nothing to explain: {searched}"
    assert oc.explain(optax.adam(0.1).init(PARAMS)) == nothing
    assert oc.explain(optax.adam(0.1).init(PARAMS), PARAMS).splitlines() == [
        nothing,
        "parameters: norm 2.45",
    ]
    many = jax.vmap(lambda _: CLIP.init(PARAMS))(jnp.arange(2))
    with pytest.raises(ValueError, match="several runs"):
        oc.explain(many)
    with pytest.raises(ValueError, match="several runs"):
        oc.monitoring.bad_steps(jax.vmap(lambda _: oc.watch().init(PARAMS))(jnp.arange(2)))


def test_parameters_that_are_one_bare_array():
    one = jnp.ones(3)
    tx = optax.chain(oc.watch(), oc.clip_by_leaf_norm(1.0))
    _, state = tx.update(one, tx.init(one))
    assert (
        oc.explain(state, one)
        == "step 1: norm 1.73; clipped to 1.0 (1 of 1 steps)\nparameters: norm 1.73"
    )
    _, state = tx.update(one * jnp.nan, state)
    text = "step 2: not finite; set to NaN (1 of 2 steps, 1 not finite)\nbad: step 2: not finite"
    assert oc.explain(state) == text
    assert oc.explain(state, one * jnp.nan).endswith(
        "parameters: not finite: go back to a checkpoint"
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_culprit_is_the_planted_one(seed):
    """Whichever block is scaled up or set to NaN is the one that is named."""
    rng = np.random.default_rng(seed)
    params = {
        f"block_{i}": jnp.asarray(rng.normal(size=3) * np.exp(rng.normal()), jnp.float32)
        for i in range(30)
    }
    tx = optax.chain(oc.watch(), CLIP)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(20):
        grads = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in params}
        name = f"block_{rng.integers(30)}"
        if step == 15:
            grads[name] *= 100
            assert f"% of it in {name};" in oc.explain(update(grads, state)[1])
        if step == 17:
            grads[name] = grads[name].at[1].set(jnp.nan)
            assert f"first in {name};" in oc.explain(update(grads, state)[1])
        _, state = update(grads, state)
    assert [(bad.first.step, bad.worst.step) for bad in oc.monitoring.bad_steps(state)] == [
        (16, 18)
    ]
