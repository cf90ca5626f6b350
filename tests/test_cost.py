"""The cost of a clip on a CPU, read from the compiled programs: a broken fusion, a copy or a second
read of the gradients fails here. Nothing is timed.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import norms, scopes, xla
from optaxclip.xla.scaling import _bfloat16
from tests import conftest as strict
from tests.benchmarks.speed import OPTIMIZERS, account, compile_step
from tests.cases import CASES

pytestmark = [
    pytest.mark.usefixtures("as_users"),  # optimizers promote dtypes
    pytest.mark.skipif(
        jax.__version_info__ < (0, 10),
        reason="the compiler of an older JAX reads the gradients twice",
    ),
]

TREE = {
    "embed": (4000, 512),
    "kernel": (512, 1024),
    "conv": (3, 3, 128, 256),
    "bias": (1024,),
    "scale": (512,),
}
CLIPS = {
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "leaf": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "groups": lambda: optaxclip.clip_by_group_norm(1.0),
    "block rms": lambda: optaxclip.clip_by_block_rms(1.0),
    "units": lambda: optaxclip.clip_by(1.0, scope=optaxclip.scopes.units()),
    "smooth": lambda: optaxclip.smooth_clip(1.0),
    "zero": lambda: optaxclip.clip_by_global_norm(1.0, nonfinite="zero"),
    "zclip": lambda: optaxclip.zclip(),
    "autoclip": lambda: optaxclip.autoclip(),
    "adagc, a leaf": lambda: optaxclip.adagc(),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compile_chain(clip, optimizer, dtype):
    return compile_step(optax.chain(clip, OPTIMIZERS[optimizer]()), TREE, dtype, strict.AS_USERS)


@functools.cache
def bare(optimizer, dtype):
    """What an optimizer costs without a clip."""
    return account(compile_chain(optax.identity(), optimizer, dtype), TREE, dtype)


def beside(clip, optimizer, dtype):
    """What a clip adds to an optimizer: bytes per parameter, and temporaries relative to the
    gradients.
    """
    own = account(compile_chain(clip, optimizer, dtype), TREE, dtype)
    return tuple(a - b for a, b in zip(own, bare(optimizer, dtype), strict=True))


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_a_clip_is_one_read_of_the_gradients(clip):
    read, copies = beside(clip(), "adamw", jnp.float32)
    assert 3.9 < read <= 4.1 and copies < 0.05


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_with_every_optimizer(name):
    read, copies = beside(optaxclip.clip_by_global_norm(1.0), name, jnp.float32)
    assert 3.9 < read <= 4.1 and copies < 0.05


@pytest.mark.parametrize(
    ("name", "clip"), [("adamw", "global"), ("Nesterov", "global"), ("adamw", "units")]
)
def test_bfloat16_gradients_are_read_once_and_not_copied(name, clip):
    read, copies = beside(CLIPS[clip](), name, jnp.bfloat16)
    assert 1.9 < read <= 2.1 and copies < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_unit_the_parameters_are_read_too(dtype):
    read, copies = beside(optaxclip.adaptive_grad_clip(0.01), "adamw", DTYPES[dtype])
    both = 4 + jnp.dtype(dtype).itemsize
    assert both - 0.1 < read <= both + 0.2 and copies < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_of_elements_cost_nothing(dtype):
    read, copies = beside(optaxclip.clip(1.0), "adamw", DTYPES[dtype])
    assert abs(read) < 0.1 and copies < 0.05


def test_the_account_detects_an_extra_read():
    """Optax's clip divides, and XLA keeps the quotient instead of fusing it. Neither program has a
    branch.
    """
    read, copies = beside(optax.clip_by_global_norm(1.0), "adamw", jnp.float32)
    assert read > 15 and copies > 0.9
    for clip in (optax.identity(), optax.clip_by_global_norm(1.0)):
        compiled = compile_chain(clip, "adamw", jnp.float32)
        all_bytes = compiled.cost_analysis()["bytes accessed"] / sum(map(np.prod, TREE.values()))
        assert account(compiled, TREE)[0] == pytest.approx(all_bytes, rel=1e-3)


PLATFORMS = ["cuda", "tpu"]


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_forms_for_other_platforms_give_the_same_numbers(platform, monkeypatch):
    """They run on a CPU here; only the order of summation may differ."""
    everything = {case.name: case.make(0.7) for case in CASES}
    everything |= {"adagc": optaxclip.adagc(), "zclip": optaxclip.zclip()}
    everything["watch"] = optaxclip.watch(histogram=True)
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (4, 3), "bias": (3,)}, "b": (5,), "c": (2, 2, 3, 2), "d": (4, 3)}
    arrays = {"is_leaf": lambda x: isinstance(x, tuple)}
    small = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, **arrays)
    large = jax.tree.map(lambda g: 1e25 * g, small)

    def steps(small, large):
        def two(tx):
            _, state = tx.update(small, tx.init(small), small)
            return tx.update(large, state, small)

        return {name: two(tx) for name, tx in everything.items()}

    def slopes(small):
        """The gradient of each clip by itself, so that none masks another."""

        def through(tx, grads):
            return sum(
                jnp.sum(jnp.sin(u))
                for u in jax.tree.leaves(tx.update(grads, tx.init(grads), small)[0])
            )

        some = [
            case
            for case in CASES
            if case.block == "unit" or case.name in ("clip_by_global_norm", "clip_by_leaf_norm")
        ]
        return {
            case.name: jax.grad(functools.partial(through, case.make(0.7)))(small) for case in some
        }

    def both(small, large):
        return steps(small, large), slopes(small)

    here = jax.jit(both)(small, large)
    chosen = []

    def form_of(*operands, default, **forms):
        chosen.append(forms.get(platform, default))
        return chosen[-1](*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", form_of)
    jax.clear_caches()  # its traces have the forms for a CPU
    there = jax.jit(lambda *grads: both(*grads))(small, large)
    jax.clear_caches()
    assert chosen
    chex.assert_trees_all_close(here[0], there[0], rtol=2e-5, atol=1e-30)
    chex.assert_trees_all_close(here[1], there[1], rtol=2e-5, atol=1e-6)


MANY = {f"layer{i}": jnp.eye(3)[i % 3] for i in range(136)}


def test_many_leaves_share_their_loops():
    """A loop for each leaf would be compiled for each leaf."""
    tx = optaxclip.clip_by_leaf_norm(1.0)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    text = step.lower(MANY).compile(strict.AS_USERS).as_text()
    loop = r"^%fused_computation\S* \(.*?\) -> f32\[3\] .*?\n(.*?)^}"
    loops = re.findall(loop, text, re.DOTALL | re.MULTILINE)
    names = re.compile(r", metadata=\{[^}]*\}|(?<=%)[\w.-]+")
    assert len(loops) >= len(MANY)
    assert len({names.sub("", loop) for loop in loops}) <= 16


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_many_leaves_keep_their_second_derivatives(scale):
    """If all numbers are 1, they come from another branch."""
    arrays, paths = [scale * x for x in MANY.values()], list(MANY)
    shapes = [x.shape for x in arrays]
    layout = xla.lay_out(scopes.leaf.cut(paths, shapes), paths, shapes)
    slopes = jax.grad(lambda xs: xla.measure(norms.l2, xs, layout).sum())
    along = [x + 1 for x in MANY.values()]
    _, curves = jax.jit(lambda *xs: jax.jvp(slopes, *xs))((arrays,), (along,))
    chex.assert_trees_all_close(curves, [(1 - x) / scale for x in MANY.values()], rtol=1e-6)


def test_rounding_to_bfloat16_matches_a_conversion():
    bits = jnp.concatenate(
        [jnp.arange(0, 2**32 - 1, 65_521, jnp.uint32), jnp.arange(2**15, dtype=jnp.uint32)]
    )
    near_ties = jnp.concatenate([bits, bits & jnp.uint32(0xFFFF0000) | jnp.uint32(0x8000)])
    x = jax.lax.bitcast_convert_type(near_ties, jnp.float32)
    by_hand = jax.jit(_bfloat16, compiler_options=strict.AS_USERS)(x)
    got, want = (
        jax.lax.bitcast_convert_type(y, jnp.uint16) for y in (by_hand, x.astype(jnp.bfloat16))
    )
    assert jnp.all((got == want) | jnp.isnan(x)) and jnp.all(jnp.isnan(by_hand) == jnp.isnan(x))
