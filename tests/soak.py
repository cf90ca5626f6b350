"""Random clips, made of parts, on random gradients: each is held to the laws of all clips.

    uv run python -m tests.soak [--minutes 30] [--seed 0]

Prints how many compositions were run. Of one that breaks a law it prints the parts, made as small
as possible, and exits with 1. Not collected by pytest: it runs for as long as one likes.
"""

import argparse
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import optaxclip as oc
from optaxclip import actions, feeds, norms, scopes, thresholds, wrappers

SHAPES = {
    "body": {"bias": (3,), "kernel": (4, 3)},
    "empty": (0, 2),
    "head": {"kernel": (3, 2)},
    "layers": {"kernel": (2, 3, 2)},
    "scale": (),
}
STEPS = 6
SCOPES = {
    "tree": scopes.tree,
    "leaf": scopes.leaf,
    "groups": scopes.groups(),
    "groups by letter": scopes.groups(lambda path: "ab"[path < "d"]),
    "units": scopes.units(...),
    "units of rows": scopes.units(-1),
    "element": scopes.element,
    "stacked": scopes.stacked("^layers"),
    "stacked groups": scopes.stacked("^layers", scopes.groups()),
}
NORMS = {"l2": norms.l2, "l1": norms.l1, "linf": norms.linf, "rms": norms.rms, "l1.5": 1.5}
ACTIONS = {
    "rescale": actions.rescale,
    "normalize": actions.normalize,
    "zero": actions.zero,
    "smooth": actions.smooth(2.0),
    "band": actions.band(0.5),
}
THRESHOLDS = {
    "0": lambda: 0.0,
    "1": lambda: 1.0,
    "inf": lambda: jnp.inf,
    "schedule": lambda: optax.linear_schedule(1.0, 0.1, 4),
    "running": lambda: thresholds.running(1.5),
    "running, accepted": lambda: thresholds.running(2.0, feed=feeds.accepted),
    "zscore": lambda: thresholds.zscore(1.0, warmup_steps=2),
    "log_zscore": lambda: thresholds.log_zscore(1.0, warmup_steps=2),
    "window_zscore": lambda: thresholds.window_zscore(1.0, window=4),
    "percentile": lambda: thresholds.percentile(60.0, window=4),
    "median": lambda: thresholds.median(1.5, window=4, every=2),
    "capped": lambda: thresholds.at_most(thresholds.running(1.5), 1.0),
    "floored": lambda: thresholds.at_least(thresholds.running(1.5), 0.5),
    "until": lambda: thresholds.until(2, 1.0),
    "lag": lambda: thresholds.lag(optax.chain(optax.ema(0.5), optax.scale(2.0))),
}
WRAPPERS = {
    "none": lambda clip: clip,
    "momentum": lambda clip: optax.chain(clip, optax.trace(0.9)),
    "watch": lambda clip: optax.chain(oc.watch(), clip),
    "skip_nonfinite": lambda clip: oc.skip_nonfinite(optax.chain(clip, optax.trace(0.9))),
    "skip_spikes": lambda clip: oc.skip_spikes(clip, 1e3),
    "dynamic_loss_scale": lambda clip: wrappers.dynamic_loss_scale(clip, 1.0),
    "MultiSteps": lambda clip: optax.MultiSteps(clip, 2).gradient_transformation(),
    "apply_if_finite": lambda clip: optax.apply_if_finite(clip, 2),
}
DTYPES = ("float32", "float16", "bfloat16", "complex64", "mixed")
POISONS = (None, None, jnp.nan, jnp.inf, -jnp.inf)


class Composition(NamedTuple):
    """Names of parts, and what each step's gradients are multiplied by and poisoned with."""

    scope: str
    norm: str
    threshold: str
    action: str
    wrapper: str
    dtype: str
    nonfinite: str
    exclude: str | None
    factors: list[float]
    poisons: list[Any]


COMPOSITIONS = st.builds(
    Composition,
    *(st.sampled_from(sorted(x)) for x in (SCOPES, NORMS, THRESHOLDS, ACTIONS, WRAPPERS)),
    st.sampled_from(DTYPES),
    st.sampled_from(["propagate", "zero"]),
    st.sampled_from([None, "^body"]),
    st.lists(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1.0, 30.0]), min_size=STEPS, max_size=STEPS),
    st.lists(st.sampled_from(POISONS), min_size=STEPS, max_size=STEPS),
)


def make(parts: Composition):
    """The clip, and the same in its wrapper."""
    clip = oc.clip_by(
        THRESHOLDS[parts.threshold](),
        scope=SCOPES[parts.scope],
        norm=NORMS[parts.norm],
        action=ACTIONS[parts.action],
        nonfinite=parts.nonfinite,
        exclude=parts.exclude,
    )
    return clip, WRAPPERS[parts.wrapper](clip)


def draw(parts: Composition):
    """Gradients of all steps, stacked; a poison is in one number of the head."""
    rng = np.random.default_rng(len(str(parts)))
    factors = np.array(parts.factors)
    kinds = iter(["float32", "float16", "bfloat16", "complex64"] * 3)

    def leaf(shape):
        dtype = next(kinds) if parts.dtype == "mixed" else parts.dtype
        x = rng.normal(size=(STEPS, *shape)) * factors.reshape(-1, *[1] * len(shape))
        return jnp.asarray(x, dtype)

    grads = jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    for i, poison in enumerate(parts.poisons):
        if poison is not None:
            grads["head"]["kernel"] = grads["head"]["kernel"].at[i, 0, 0].set(poison)
    return grads


def scan(tx, grads, params):
    """Updates and metrics of all steps, stacked, as NumPy; and the last state."""

    def step(state, now):
        updates, state = tx.update(now, state, params)
        return state, (updates, oc.metrics(state), state)

    state, seen = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(grads)
    return *jax.device_get(seen), state


def hold(parts: Composition) -> None:
    """Raises AssertionError where a law is broken."""
    grads = draw(parts)
    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)
    clip, wrapped = make(parts)
    updates, seen, states = scan(clip, grads, params)[:3]
    head, bad = updates["head"]["kernel"], np.array([p is not None for p in parts.poisons])
    is_ok(parts, grads, updates, bad)
    if parts.exclude is None:
        poisoned = head[bad, 0, 0]
        assert (np.isnan(poisoned) if parts.nonfinite == "propagate" else poisoned == 0).all()
    assert not any(np.isnan(x).any() for k, x in seen.items() if "bound" in k)
    if parts.action == "rescale":
        is_within(parts, updates, states, params)
    if parts.wrapper == "none":
        is_same_without_jit(clip, grads, params, updates)
    else:  # whose state keeps its structure, or it could not be scanned
        after = scan(wrapped, grads, params)[0]
        if parts.wrapper in ("skip_nonfinite", "dynamic_loss_scale"):
            assert not any(x[bad].any() for x in jax.tree.leaves(after))


def is_same_without_jit(clip, grads, params, updates) -> None:
    """The first two steps, op by op."""
    state = clip.init(params)
    for i in range(2):
        now, state = clip.update(jax.tree.map(lambda g, i=i: g[i], grads), state, params)
        for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(*map(to_wide, (a, b[i])), rtol=2e-2, atol=1e-6)


def to_wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def is_ok(parts, grads, updates, bad) -> None:
    """Dtypes are kept, what is finite stays finite, and no number changes its sign."""
    for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True):
        assert u.dtype == g.dtype and u.shape == g.shape
        g, u = to_wide(g)[~bad], to_wide(u)[~bad]
        assert np.isfinite(u).all()
        assert (np.real(u * np.conj(g)) >= 0).all()


def is_within(parts, updates, states, params) -> None:
    """Each block is at most as long as its bound, measured by a clip that changes nothing."""
    ruler = oc.clip_by(
        jnp.inf, scope=SCOPES[parts.scope], norm=NORMS[parts.norm], exclude=parts.exclude
    )
    _, _, measured, _ = scan(ruler, updates, params)
    eps = 1e-2 if parts.dtype != "float32" and parts.dtype != "complex64" else 1e-5
    for n, bound in zip(
        jax.tree.leaves(measured.metrics.grad_norm),
        jax.tree.leaves(states.metrics.clip_bound),
        strict=True,
    ):
        fine = np.isfinite(n)
        assert (n[fine] <= bound[fine] * (1 + eps) + 1e-7).all()


def main(argv=None) -> int:
    """Runs until the time is over, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    end, count = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:

        @seed(args.seed + count)
        @settings(max_examples=50, deadline=None, database=None, suppress_health_check=HealthCheck)
        @given(COMPOSITIONS)
        def run(parts):
            nonlocal count
            count += 1
            hold(parts)

        try:
            run()
        except AssertionError as error:
            print(error, *getattr(error, "__notes__", ()), sep="\n")
            return 1
        # A program a composition: without this they pile up until the memory is full.
        jax.clear_caches()
        print(f"{count} compositions, all laws kept", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
