"""What compositions are made of, and how they are drawn."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import optaxclip as oc
from optaxclip import actions, feeds, norms, scopes, thresholds, wrappers
from optaxclip.thresholds.convert import as_threshold

# A mesh of 2 x 4 devices cuts them.
SHAPES = {
    "body/bias": (2,),
    "body/kernel": (4, 2),
    "empty": (0, 2),
    "head/kernel": (2, 4),
    "layers/kernel": (2, 4, 2),
    "scale": (),
}
SPECS = {
    "body/bias": P("x"),
    "body/kernel": P("y", "x"),
    "empty": P(),
    "head/kernel": P("x"),
    "layers/kernel": P(None, "y", "x"),
    "scale": P(),
}
STEPS = 4
SCOPES = {
    "tree": scopes.tree,
    "leaf": scopes.leaf,
    "groups": scopes.groups(),
    "groups by letter": scopes.groups(lambda path: "ab"[path < "d"]),
    "units": scopes.units(...),
    "units by convention": scopes.units(),
    "units of rows": scopes.units(-1),
    "element": scopes.element,
    "stacked": scopes.stacked("^layers"),
    "stacked groups": scopes.stacked("^layers", scopes.groups()),
}
NORMS = {
    "l2": norms.l2,
    "l1": norms.l1,
    "linf": norms.linf,
    "rms": norms.rms,
    "l1.5": norms.lp(1.5),
    "l3": norms.lp(3),
}
ACTIONS = {
    "rescale": actions.rescale,
    "normalize": actions.normalize,
    "zero": actions.zero,
    "smooth": actions.smooth(2.0),
    "smooth, p=1": actions.smooth(1.0),
    "band": actions.band(0.5),
    "band with a floor": actions.band(0.0, floor=0.25),
}
_THRESHOLDS = {
    "0": lambda: 0.0,
    "1": lambda: 1.0,
    "inf": lambda: jnp.inf,
    "schedule": lambda: optax.linear_schedule(1.0, 0.1, 3),
    "running": lambda: thresholds.running(1.5),
    "running, accepted": lambda: thresholds.running(2.0, feed=feeds.accepted, relearn_after=2),
    "previous": lambda: thresholds.previous(1.5),
    "zscore": lambda: thresholds.zscore(1.0, warmup_steps=2),
    "log_zscore": lambda: thresholds.log_zscore(1.0, warmup_steps=2),
    "window_zscore": lambda: thresholds.window_zscore(1.0, window=3),
    "percentile": lambda: thresholds.percentile(60.0, window=3),
    "median": lambda: thresholds.median(1.5, window=3, every=2),
    "quantile": lambda: thresholds.quantile(0.5, 0.2),
    "norm_ratio": lambda: thresholds.norm_ratio(),
    "capped": lambda: thresholds.at_most(thresholds.running(1.5), 1.0),
    "floored": lambda: thresholds.at_least(thresholds.running(1.5), 0.5),
    "until": lambda: thresholds.until(2, 1.0),
    "until, then": lambda: thresholds.until(2, 1.0, thresholds.running(1.5)),
    "lag": lambda: thresholds.lag(optax.chain(optax.ema(0.5, debias=False), optax.scale(2.0))),
}
THRESHOLDS = {name: as_threshold(threshold=make()) for name, make in _THRESHOLDS.items()}


def _compiled(threshold):
    """The same threshold, whose update is one program: there are as many as shapes of norms."""
    update = jax.jit(lambda norms, state, params: threshold.update(norms, state, params))

    def update_fn(norms, state, params=None, **extra_args):
        return update(norms, state, params)

    return type(threshold)(threshold.init, update_fn)


COMPILED = {name: _compiled(threshold) for name, threshold in THRESHOLDS.items()}
# Their steps are counted for all blocks at once.
COUNTING = {"schedule", "until"}


def _is_no_body(params):
    return {path: not path.startswith("body") for path in params}


WRAPPERS = {
    "none": lambda clip: clip,
    "momentum": lambda clip: optax.chain(clip, optax.trace(0.9)),
    "watch": lambda clip: optax.chain(oc.watch(), clip),
    "masked": lambda clip: optax.masked(clip, _is_no_body),
    "skip_nonfinite": lambda clip: oc.skip_nonfinite(optax.chain(clip, optax.trace(0.9))),
    "skip_spikes": lambda clip: oc.skip_spikes(clip, 1e3, max_consecutive_skips=2),
    "dynamic_loss_scale": lambda clip: wrappers.dynamic_loss_scale(clip, 4.0, growth_interval=2),
}
# They hold a `cond`, which is compiled at each step.
SLOW = {
    "MultiSteps": lambda clip: optax.MultiSteps(clip, 2).gradient_transformation(),
    "apply_if_finite": lambda clip: optax.apply_if_finite(clip, 2),
}
# Optax's own take no integers.
TAKE_INTEGERS = ("none", "watch", "masked", "skip_spikes", "dynamic_loss_scale")
# Of each leaf. With more of them there would be more to compile, and no new pair of dtypes.
DTYPES = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "mixed": ("float32", "float16", "bfloat16", "complex64"),
}
WIDE = {"mixed with float64": ("float16", "float64", "bfloat16", "complex64")}
HUGE = 3e38
POISONS = (None, None, None, jnp.nan, jnp.inf, -jnp.inf, HUGE)
FACTORS = (1.0, 1.0, 0.1, 1e-3, 0.0, 1e-30, 30.0, 1e25)
# How a composition is run. Drawn as often as stated, of a thousand: the others are compiled.
MESHES = {
    "op by op": 930,
    "vmap": 30,
    "jit": 16,
    "sharded": 8,
    "explicit": 4,
    "shard_map": 6,
    "shard_map without types": 6,
}
# What is cut into units must not lie across devices, and the record of elements is as large as the
# gradients.
IN_PARTS = ("tree", "leaf", "groups", "groups by letter")


class Composition(NamedTuple):
    """Names of parts, and what each step's gradients are multiplied by and poisoned with."""

    scope: str
    norm: str
    threshold: str
    action: str
    wrapper: str
    dtype: str
    mesh: str
    nonfinite: str
    exclude: str | None
    integers: bool
    seed: int
    factors: tuple[float, ...]
    poisons: tuple[tuple[Any, str], ...]

    @property
    def structure(self) -> tuple:
        """All but the numbers."""
        return self[:10]

    @property
    def measured(self) -> list[str]:
        """The leaves that the clip sees."""
        return [path for path in SHAPES if not (self.exclude and path.startswith("body"))]


def fits(parts: Composition) -> bool:
    """Whether there is such a clip."""
    in_parts = parts.mesh in ("vmap", "shard_map", "shard_map without types")
    return not (
        # Both leave out the same leaves, so that there is less to compile.
        (parts.wrapper == "masked" and not parts.exclude)
        or (parts.integers and parts.wrapper not in TAKE_INTEGERS)
        or (in_parts and parts.scope not in IN_PARTS)
        # Their own states are as large as the gradients, or they do not know of axes.
        or (in_parts and parts.wrapper not in ("none", "momentum", "masked"))
    )


def compositions(*, wide: bool, meshes: dict[str, int] = MESHES):
    """A strategy; with `wide` for a JAX with x64."""
    dtypes = DTYPES | WIDE if wide else DTYPES

    # By a random generator, and not by a strategy for each part: hypothesis prefers the first of a
    # long table, and varies the numbers of one clip five times.
    def pick(rng: random.Random) -> Composition:
        poisons = [
            (rng.choice(POISONS), rng.choice(["head/kernel", "scale"])) for _ in range(STEPS)
        ]
        return Composition(
            *(rng.choice(sorted(x)) for x in (SCOPES, NORMS, THRESHOLDS, ACTIONS)),
            rng.choice(sorted(WRAPPERS) * 9 + sorted(SLOW)),
            rng.choice(sorted(dtypes)),
            *rng.choices(list(meshes), list(meshes.values())),
            rng.choice(["propagate", "zero"]),
            rng.choice([None, "^body"]),
            rng.random() < 0.5,
            rng.getrandbits(32),
            tuple(rng.choices(FACTORS, k=STEPS)),
            tuple(poisons),
        )

    return st.randoms(use_true_random=True).map(pick).filter(fits)


PLAIN = Composition(
    *("tree", "l2", "1", "rescale", "none", "float32", "op by op", "propagate", None, False, 0),
    (1.0,) * STEPS,
    ((None, "scale"),) * STEPS,
)


def shrink(parts: Composition, breaks: Callable[[Composition], bool]) -> Composition:
    """The composition, with the plainest parts where it breaks a law with these as well."""
    for field, plain in PLAIN._asdict().items():
        other = parts._replace(**{field: plain})
        if fits(other) and breaks(other):
            parts = other
    return parts


def make(parts: Composition, **more):
    """The clip, in its wrapper."""
    thresholds_ = COMPILED if parts.mesh in ("op by op", "vmap") else THRESHOLDS
    clip = oc.clip_by(
        thresholds_[parts.threshold],
        scope=SCOPES[parts.scope],
        norm=NORMS[parts.norm],
        action=ACTIONS[parts.action],
        nonfinite=parts.nonfinite,
        exclude=None if parts.wrapper == "masked" else parts.exclude,
        **more,
    )
    return (WRAPPERS | SLOW)[parts.wrapper](clip)


def draw(parts: Composition) -> list[dict[str, Any]]:
    """The gradients of each step, as NumPy's; a poison is one number of a leaf."""
    rng = np.random.default_rng(parts.seed)
    dtypes = ((DTYPES | WIDE)[parts.dtype] * len(SHAPES))[: len(SHAPES)]
    steps = []
    for factor, (poison, place) in zip(parts.factors, parts.poisons, strict=True):
        grads: dict[str, Any] = {}
        for (path, shape), dtype in zip(SHAPES.items(), dtypes, strict=True):
            x = np.array(rng.normal(size=shape) * factor)
            # Units a scale apart by more than floats can tell are counted as zeros.
            if path == place and poison is not None and not (poison == HUGE and factor < 1e-3):
                x.flat[0] = poison
            with np.errstate(over="ignore"):
                grads[path] = x.astype(jnp.dtype(dtype))
        if parts.integers:
            grads |= {"none": None, "steps": np.arange(3, dtype=np.int32)}
        steps.append(grads)
    return steps
