"""What is said about a state: the planted culprit, by name, for clips, watches and wrappers that skip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

PARAMS = {"decoder": {"layers": [{"attn": {"kernel": jnp.full((2, 2), 0.5)}} for _ in range(4)]}, "embed": jnp.ones(2)}


def grads_of(factor, culprit=1.0):
    grads = jax.tree.map(lambda p: p * factor, PARAMS)
    grads["decoder"]["layers"][3]["attn"]["kernel"] *= culprit
    return grads


def said(tx, *steps, params=None):
    """What is said after steps, each a factor or a factor and one more for the culprit."""
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in steps:
        _, state = update(grads_of(*np.atleast_1d(step).astype(np.float32)), state, PARAMS)
    return oc.explain(state, params)


USUAL = [1.0, 1.1, 0.9] * 5
CLIP = oc.clip_by_global_norm(1.0)


def test_the_sentence_of_the_readme():
    text = said(optax.chain(oc.watch(), CLIP), *USUAL, (1.0, 30.0)).splitlines()
    first = "step 16: norm 30.1 = 13 x the median; 99 % of it in decoder/layers/3/attn/kernel; clipped to 1.0 (16 of 16"
    assert (
        text[0].startswith(first[:19])
        and text[0].split("x the median")[1] == first.split("x the median")[1] + " steps)"
    )
    assert text[1].startswith("bad: step 16: norm 30.1 = ")
    assert text[2].startswith("norms lately: 5 % below ")
    assert text[3].startswith("would have clipped of 16 steps: 100 % at 0.1, 100 % at 0.5")


def test_a_clip_alone_says_what_it_knows():
    assert said(CLIP) == "no step yet"
    assert said(CLIP, 1.0) == "step 1: norm 2.45; clipped to 1.0 (1 of 1 steps)"
    assert said(CLIP, 1.0, 0.1) == "step 2: norm 0.245; not clipped: within 1.0 (1 of 2 steps)"
    assert said(oc.zclip(), 1.0) == "step 1: norm 2.45; not clipped: no bound (0 of 1 steps)"
    assert said(CLIP, jnp.nan) == "step 1: the norm is not finite; all of it is NaN now (0 of 1 steps, 1 not finite)"
    zero = oc.clip_by_global_norm(1.0, nonfinite="zero")
    assert said(zero, jnp.inf).startswith("step 1: the norm is not finite; made zero")
    assert "scaled to 1.0" in said(oc.clip_by(1.0, action=oc.normalize), 0.1)
    assert "of units or elements clipped" in said(oc.clip(0.7), 1.0)


def test_a_clip_of_blocks_names_the_block():
    text = said(oc.clip_by_leaf_norm(2.0), (1.0, 10.0))
    what = "step 1: norm 10 in decoder/layers/3/attn/kernel, the longest of 5;"
    assert text == what + " 1 of 5 blocks clipped, most decoder/layers/3/attn/kernel, to 2.0 (1 of 1 steps)"
    assert "nothing clipped" in said(oc.clip_by_leaf_norm(20.0), 1.0)
    assert "in 1 of 5 blocks, first in decoder/layers/3" in said(oc.clip_by_leaf_norm(2.0), (1.0, jnp.nan))


def test_steps_that_are_not_finite():
    tx = optax.chain(oc.watch(), CLIP)
    assert "not finite in 1 of 5 blocks, first in decoder/layers/3/attn/kernel; all of it is NaN" in said(
        tx, (1.0, jnp.inf)
    )
    assert "not finite in all of 5 blocks: the loss itself" in said(tx, jnp.nan)


def test_a_watch_alone_and_after():
    assert said(oc.watch(), 1.0).startswith("step 1: norm 2.45; 33 % of it in embed")
    assert said(oc.watch()).endswith("nothing seen yet")
    assert "NaN" not in said(oc.watch(), 0.0)
    text = said(optax.chain(CLIP, oc.watch()), 1.0)  # behind the clip it sees other norms: two lines
    assert text.splitlines()[0].startswith("step 1: norm 2.45; clipped") and "step 1: norm 1.0; 33 %" in text


def test_wrappers_that_skip():
    tx = optax.chain(oc.watch(), oc.skip_spikes(optax.sgd(0.1), 10.0))
    assert "step taken (0 of 15 steps skipped)" in said(tx, *USUAL)
    assert "kernel; step skipped, over 10 (1 of 16 steps skipped, 1 without a break)" in said(tx, *USUAL, (1.0, 30.0))
    inside = said(oc.skip_spikes(optax.chain(oc.watch(), CLIP, optax.sgd(0.1)), 10.0), *USUAL, (1.0, 30.0)).splitlines()
    assert inside[0].startswith("clip/0: step 16: norm 30.1; step skipped") and inside[1].startswith("clip/1: step 15:")
    nan = said(oc.skip_nonfinite(optax.sgd(0.1)), 1.0, jnp.nan)
    assert nan == "step 2: the norm is not finite; step skipped (1 of 2 steps skipped, 1 without a break)"
    tx = oc.skip_spikes(optax.sgd(0.1), jnp.inf, loss_threshold=1.0)
    _, state = tx.update(PARAMS, tx.init(PARAMS), loss=2.0)
    assert "skipped for its loss" in oc.explain(state)


def test_parameters():
    assert said(CLIP, 1.0, params=PARAMS).splitlines()[1] == "parameters: norm 2.45"
    lost = PARAMS | {"embed": jnp.array([1.0, jnp.nan])}
    assert "not finite in 1 of 5 leaves, first in embed" in said(CLIP, 1.0, params=lost)


def test_nothing_and_too_much():
    assert oc.explain(optax.adam(0.1).init(PARAMS)) == ""
    many = jax.vmap(lambda _: CLIP.init(PARAMS))(jnp.arange(2))
    with pytest.raises(ValueError, match="several runs"):
        oc.explain(many)
    with pytest.raises(ValueError, match="several runs"):
        oc.bad_steps(jax.vmap(lambda _: oc.watch().init(PARAMS))(jnp.arange(2)))


@pytest.mark.parametrize("seed", range(3))
def test_the_culprit_is_the_planted_one(seed):
    """Whichever block is blown up or made NaN among many of various size, it is the one that is named."""
    rng = np.random.default_rng(seed)
    params = {f"block_{i}": jnp.asarray(rng.normal(size=3) * np.exp(rng.normal()), jnp.float32) for i in range(30)}
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
    assert [bad.step for bad in oc.bad_steps(state)] == [16, 18]
