"""How runs fail, as simulated series: what `diagnose` must name first in each, and must not name.

A case draws a recorded run from a generator, so that rates over many seeds can be counted; see
`tests/benchmarks/diagnosis.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

Run = dict[str, np.ndarray]
LAYERS = 6
# Signs that would mislead somebody whose run has an explosion, or any other fault.
SILENT = "nothing"
VANISHING = frozenset({"norms-vanishing", "norms-fall-with-depth", "zero-gradients", "layer-dead"})
EXPLODING = frozenset({"norms-exploding", "norms-jumped", "learning-rate-too-high"})
BROKEN = frozenset({"norm-not-finite", "loss-not-finite", "norm-overflow"})


class Case(NamedTuple):
    """One way to fail, or to be healthy.

    Attributes:
      draw: a recorded run, given a generator.
      first: what must be named first; `SILENT` for a healthy run.
      never: what must not be named at all.
      block: whether the culprit is `layers/3`, which must then be named.
    """

    draw: Callable[[np.random.Generator], Run]
    first: str
    never: frozenset[str] = frozenset()
    block: bool = False


def healthy(rng, steps=None, norms=1.0, noise=0.3, loss=None) -> Run:
    """A run with six layers, a clip that is active now and then, a falling loss."""
    steps = steps or int(rng.integers(150, 600))
    level = norms * np.exp(noise * rng.normal(size=steps)) * 10 ** rng.uniform(-2, 1)
    shares = np.sqrt(rng.dirichlet(np.full(LAYERS, 5.0)))
    blocks = [level * s * np.exp(0.1 * rng.normal(size=steps)) for s in shares]
    t = np.arange(steps)
    falling = 0.5 + 2.5 * np.exp(-t / (steps * rng.uniform(0.1, 1))) if loss is None else loss
    weights = 10 + rng.uniform(0.5, 3) * np.sqrt(t / steps)
    return finish(blocks, falling * (1 + 0.02 * rng.normal(size=steps)), weights)


def finish(blocks, losses, weights, bound=None) -> Run:
    """The table of a run: what `metrics` writes for a watch and a clip behind it."""
    blocks = np.asarray(blocks)
    with np.errstate(over="ignore", invalid="ignore"):
        # Relative to the largest, because squares of 1e200 are beyond float64.
        unit = np.where(np.isfinite(blocks), blocks, 1).max(axis=0) + 1e-300
        total = unit * np.sqrt(np.square(blocks / unit).sum(axis=0))
    known = total[np.isfinite(total)]
    bound = np.quantile(known, 0.9) if bound is None and len(known) else bound or 1.0
    table = {f"watch/grad_norm/layers/{i}": x for i, x in enumerate(blocks)}
    with np.errstate(invalid="ignore"):
        clipped = (total > bound) & np.isfinite(total)
    clip = {"grad_norm": total, "bound": np.full(len(total), bound), "clipped": clipped * 1.0}
    return {
        "watch/grad_norm": total,
        "watch/steps": np.arange(1.0, len(total) + 1),
        **table,
        **{f"clip/{key}": x for key, x in clip.items()},
        "loss": losses,
        "param_norm": weights,
    }


def blocks_of(run: Run) -> np.ndarray:
    return np.stack([run[f"watch/grad_norm/layers/{i}"] for i in range(LAYERS)])


def change(run: Run, factor=1.0, *, layers=None, loss=1.0, weights=1.0, bound=None) -> Run:
    """A run whose norms (of all layers, or some), losses and weights are multiplied."""
    blocks, chosen = blocks_of(run), range(LAYERS) if layers is None else layers
    for i in chosen:
        blocks[i] = blocks[i] * factor
    bound = run["clip/bound"][0] if bound is None else bound
    return finish(blocks, run["loss"] * loss, run["param_norm"] * weights, bound)


# Healthy runs.


def decaying(rng):
    steps = int(rng.integers(150, 600))
    return healthy(rng, steps, np.exp(-np.arange(steps) / steps * rng.uniform(1, 6)))


def falling_at_first(rng):
    """The first steps of a training have large norms."""
    steps = int(rng.integers(150, 600))
    t = np.arange(steps)
    return healthy(rng, steps, 1 + rng.uniform(10, 100) * np.exp(-t / rng.uniform(2, 15)))


def lognormal_tails(rng):
    return healthy(rng, noise=rng.uniform(0.5, 0.8))


def pareto_tails(rng):
    steps = int(rng.integers(150, 600))
    return healthy(rng, steps, 1 + rng.pareto(rng.uniform(3, 5), size=steps), noise=0.1)


def warm_up(rng):
    steps = int(rng.integers(150, 600))
    ramp = np.minimum(1, (np.arange(steps) + 1) / (steps * rng.uniform(0.1, 0.5)))
    return healthy(rng, steps, rng.uniform(0.1, 0.5) + ramp)


def restart(rng):
    """Cycles of the learning rate: norms and loss go up at each restart."""
    steps = int(rng.integers(200, 600))
    phase = np.arange(steps) % (steps // int(rng.integers(2, 5))) / steps
    up = np.exp(-phase * rng.uniform(2, 6))
    loss = (0.5 + np.exp(-np.arange(steps) / steps * 2)) * (1 + 0.3 * up)
    return healthy(rng, steps, 1 + rng.uniform(1, 5) * up, loss=loss)


def lora(rng):
    """B starts at zero: A has no gradient at the first step, and the weights grow from zero."""
    run = healthy(rng)
    steps = len(run["loss"])
    blocks = blocks_of(run)
    blocks[::2, 0] = 0
    growth = (np.arange(steps) + 1) ** rng.uniform(0.4, 1.0) * 1e-3
    return finish(blocks, run["loss"], growth)


def loss_scale(rng):
    """Overflow while a dynamic loss scale looks for its value, and where it tries the next."""
    run = overflow(rng, steps=rng.integers(0, 5), every=int(rng.integers(30, 100)))
    bad = ~np.isfinite(run["watch/grad_norm"])
    return run | {"loss_scale": 2.0 ** (15 - np.cumsum(bad) + np.arange(len(bad)) / 100)}


def scale_grows(rng):
    """A watch in front of a loss scale, which doubles now and then."""
    run = healthy(rng, int(rng.integers(300, 600)))
    steps = len(run["loss"])
    scale = 2.0 ** (np.arange(steps) // rng.integers(10, 40))
    clip = {key: x for key, x in run.items() if key.startswith("clip/")}
    skip = {"grad_norm": run["clip/grad_norm"], "consecutive": np.zeros(steps)}
    skip |= {"last_reason": np.zeros(steps), "steps": np.zeros(steps)}
    skips = {f"skip/{key}": x for key, x in skip.items()}
    return change(run, scale) | clip | skips | {"loss_scale": scale}


def vary_losses(rng, loss, much=0.2) -> np.ndarray:
    """Losses with noise as runs have it: little or much, with outliers, with the order of data."""
    steps = len(loss)
    kinds = {
        "none": lambda: np.ones(steps),
        "little": lambda: 1 + 0.02 * rng.normal(size=steps),
        "much": lambda: 1 + much * rng.normal(size=steps),
        "log-normal": lambda: np.exp(much * rng.normal(size=steps)),
        "outliers": lambda: 1 + 0.02 * rng.standard_t(3, size=steps),
        "order of data": lambda: _follow(rng, steps),
    }
    return loss * kinds[str(rng.choice(list(kinds)))]()


def _follow(rng, steps):
    """The same cycle in each epoch, and a little noise."""
    epoch = int(rng.integers(5, 25))
    return (
        1 + 0.03 * rng.normal(size=epoch)[np.arange(steps) % epoch] + 0.01 * rng.normal(size=steps)
    )


def converged(rng):
    """The loss falls within a thousandth to a tenth of the run, and stays there."""
    steps = int(rng.integers(200, 1000))
    fall = np.exp(-np.arange(steps) / (10 ** rng.uniform(-3, -1.3) * steps))
    loss = 0.5 + rng.uniform(0.5, 5) * fall
    return healthy(rng, steps, loss=loss) | {"loss": vary_losses(rng, loss)}


def full_batch(rng):
    """Without noise the gradient falls with the loss, and goes on falling when that is still."""
    steps = int(rng.integers(200, 600))
    fall = np.exp(-np.arange(steps) / steps * rng.uniform(8, 40))
    loss = 0.5 + rng.uniform(0.5, 5) * fall**2
    return healthy(rng, steps, np.maximum(fall, 1e-7), noise=0.01) | {"loss": loss}


def rare_expert(rng):
    """A layer that many batches do not reach, from the start."""
    run = healthy(rng)
    reached = rng.random(len(run["loss"])) > rng.uniform(0.3, 0.9)
    return change(run, reached, layers=[3])


# Explosions.


def explosion(rng, length, end):
    """Norms grow to a power of ten within some steps, and then are NaN, infinite, or stay there.

    Layer 3 grows first.
    """
    lasting = end == "plateau"
    before = int(rng.choice([30, 100, 300] if lasting else [1, 5, 30, 100, 300]))
    after = int(rng.integers(30, 100) if lasting else rng.integers(1, 100))
    peak = rng.uniform(3, 8) if lasting else rng.uniform(max(3, length / 40), 30)
    run = healthy(rng, before + length + after)
    rise = np.r_[np.zeros(before), np.arange(1, length + 1) / length, np.ones(after)]
    over = np.arange(before + length + after) >= before + length
    ended = over & (end != "plateau")
    with np.errstate(over="ignore"):
        lead = np.where(over, 1, 10 ** (0.7 * np.minimum(np.diff(rise, prepend=0) * length, 1)))
        loss = np.where(ended, np.nan, 1 + 10 ** (rise * 1.5) - 1)
    run = change(run, 10 ** (rise * peak), loss=loss, bound=run["clip/bound"][0])
    run = change(run, lead, layers=[3])
    if not lasting:
        lost = np.where(ended, {"nan": np.nan, "inf": np.inf}[end], 1)
        # Infinity at the first step; from then on the weights, and so everything else, are NaN.
        run = change(run, lost, weights=np.where(ended, np.nan, 1))
    return run


def late_and_lasting(rng, low, high):
    """When something begins that lasts: not in the first or last twenty steps."""
    steps = int(rng.integers(150, 600))
    start = int(rng.integers(30, steps - 30))
    return steps, start, 10 ** rng.uniform(np.log10(low), np.log10(high))


def jump(rng):
    steps, start, size = late_and_lasting(rng, 40, 3000)
    late = np.arange(steps) >= start
    return change(healthy(rng, steps), np.where(late, size, 1), loss=np.where(late, 1.3, 1))


def spike(rng, losses=False):
    steps, start, size = late_and_lasting(rng, 40, 1e5)
    t = np.arange(steps) - start
    # The spike fades over up to three steps.
    shape = np.where(t >= 0, size ** np.clip(1 - t / rng.integers(1, 4), 0, 1), 1)
    run = change(healthy(rng, steps), np.sqrt(shape))
    run = change(run, shape / np.sqrt(shape), loss=np.where(t == 0, 5, 1) if losses else 1.0)
    return change(run, np.where(t == 0, 3, 1), layers=[3])


def burst(rng):
    steps, start, size = late_and_lasting(rng, 40, 1e4)
    where = start + rng.choice(30, int(rng.integers(5, 12)), replace=False)
    shape = np.ones(steps)
    shape[np.minimum(where, steps - 1)] = size * np.exp(0.2 * rng.normal(size=len(where)))
    return change(healthy(rng, steps), shape)


def heavy(rng):
    steps = int(rng.integers(200, 600))
    return healthy(rng, steps, 1 + rng.pareto(rng.uniform(0.8, 1.3), size=steps), noise=0.1)


# Steps that are not finite.


def bad_data(rng):
    """The loss, and with it all, is NaN for a few batches, which a wrapper skips."""
    run = healthy(rng)
    bad = rng.choice(len(run["loss"]), int(rng.integers(1, 10)), replace=False)
    lost = np.ones(len(run["loss"]))
    lost[bad] = np.nan
    return change(run, lost, loss=lost)


def bad_layer(rng, first=np.nan):
    """One layer is NaN first, or infinite; with nobody who skips it, all is NaN from then on."""
    steps, start, _ = late_and_lasting(rng, 1, 2)
    t = np.arange(steps) - start
    run = change(healthy(rng, steps), np.where(t == 0, first, 1), layers=[3])
    gone = np.where(t > 0, np.nan, 1)
    return change(run, gone, loss=gone, weights=np.where(t >= 0, np.nan, 1))


def log_of_zero(rng):
    """The loss is infinite, its gradient NaN."""
    steps, start, _ = late_and_lasting(rng, 1, 2)
    t = np.arange(steps) - start
    gone, loss = np.where(t >= 0, np.nan, 1), np.where(t > 0, np.nan, np.where(t == 0, np.inf, 1))
    return change(healthy(rng, steps), gone, loss=loss, weights=gone)


def overflow(rng, steps=0, every=3):
    """Infinite norms of a finite loss, which a wrapper skips."""
    run = healthy(rng)
    t = np.arange(len(run["loss"]))
    over = (t % every == every - 1) | (t < steps)
    return change(run, np.where(over, np.inf, 1))


# No gradient, or little.


def deep(rng):
    """Each layer's norm is a fraction of the next one's, as through sigmoids."""
    run = healthy(rng, loss=rng.choice([None, 2.3]) or None)
    blocks = blocks_of(run) * rng.uniform(0.1, 0.3) ** np.arange(LAYERS)[::-1, None]
    return finish(blocks, run["loss"], run["param_norm"])


def recurrent(rng):
    """The norm fades away, and nothing is learned."""
    steps = int(rng.integers(150, 600))
    fading = np.exp(-np.arange(steps) / steps * rng.uniform(6, 20))
    return healthy(rng, steps, fading, loss=np.full(steps, 2.3))


def dead(rng):
    """From some step on a layer, and what is before it, gets no gradient any more."""
    steps, start, _ = late_and_lasting(rng, 1, 2)
    return change(healthy(rng, steps), np.where(np.arange(steps) >= start, 0, 1), layers=[3])


def dying(rng):
    """The same, but a batch now and then still reaches a unit that is not dead."""
    steps, start, _ = late_and_lasting(rng, 1, 2)
    zero = (np.arange(steps) >= start) & (rng.random(steps) < rng.uniform(0.65, 0.95))
    return change(healthy(rng, steps), np.where(zero, 0, 1), layers=[3])


def frozen(rng):
    return change(healthy(rng), 0.0, layers=[3])


def all_zero(rng):
    steps, start, _ = late_and_lasting(rng, 1, 2)
    start = int(rng.choice([0, start]))
    return change(healthy(rng, steps, loss=np.full(steps, 2.3)), np.arange(steps) < start)


# Learning rates.


def rate_too_high(rng):
    """Each step of usual gradients moves the weights by more than they are long."""
    steps, start = int(rng.integers(100, 400)), int(rng.choice([0, 30]))
    t = np.maximum(np.arange(steps) - start, 0)
    weights = 1 + rng.uniform(0.5, 5) * t
    norms = 1 + rng.uniform(0, 0.2) * t * np.exp(0.3 * rng.normal(size=steps))
    loss = np.minimum(weights, 50) * np.exp(0.3 * rng.normal(size=steps))
    return change(healthy(rng, steps, loss=np.full(steps, 2.0)), norms, loss=loss, weights=weights)


def unstable(rng):
    """A quadratic whose weights, and so norms, grow by a factor at each step, up to infinity."""
    before, length = int(rng.choice([1, 5, 100])), int(rng.integers(10, 60))
    after = int(rng.integers(1, 50))
    steps = before + length + after
    t = np.clip(np.arange(steps) - before + 1, 0, length)
    growth = 10 ** (rng.uniform(3, 15) * t / length)
    over = np.where(np.arange(steps) >= before + length, np.nan, 1)
    run = healthy(rng, steps, noise=0.1)
    # Weights are read after the update, gradients before it.
    weights = np.r_[growth[1:], growth[-1]] * np.r_[over[1:], over[-1]]
    return change(run, growth * over, loss=growth**2 * over, weights=weights)


def rate_too_low(rng):
    steps = int(rng.integers(150, 600))
    run = healthy(rng, steps, loss=2.3 - 1e-3 * np.arange(steps) / steps)
    weights = 10 + rng.uniform(1e-6, 1e-4) * np.arange(steps) / steps
    return finish(blocks_of(run), run["loss"], weights)


def stuck(rng):
    """Nothing changes, apart from noise, in which 2 % would be seen."""
    run = healthy(rng, int(rng.integers(150, 600)))
    return run | {"loss": vary_losses(rng, np.full(len(run["loss"]), 2.3), much=0.03)}


# Clips and wrappers.


def bound_too_low(rng):
    run = healthy(rng)
    bound = np.quantile(run["watch/grad_norm"], rng.uniform(0, 0.03)) * rng.uniform(0.01, 1)
    return change(run, bound=bound)


def bound_too_high(rng):
    run = healthy(rng)
    return change(run, bound=run["watch/grad_norm"].max() * 10 ** rng.uniform(1, 4))


def clip_before_mean(rng):
    """The norm that the clip saw, of one device, is over that of the mean over devices."""
    run, devices = healthy(rng), int(rng.choice([2, 4, 8]))
    noise = np.exp(0.05 * rng.normal(size=len(run["loss"])))
    local = run["clip/grad_norm"] * np.sqrt(devices) * noise
    clip = {"clip/grad_norm": local, "clip/bound": run["clip/bound"] * np.sqrt(devices)}
    clip["clip/clipped"] = 1.0 * (local > clip["clip/bound"])
    kept = {key: run[key] for key in ("loss", "param_norm")}
    return kept | clip | {"grad_norm": run["watch/grad_norm"]}


def skipped(rng, reason=None):
    """Nothing is ever applied, or nothing from some step on: the loss stays where it is."""
    steps, start, _ = late_and_lasting(rng, 1, 2)
    start, reason = int(rng.choice([0, start // 4])), reason or int(rng.choice([1, 2, 3]))
    skips = np.maximum(np.arange(steps) - start + 1, 0)
    run = healthy(rng, steps, loss=np.full(steps, 2.3))
    if reason == 3:
        run = change(run, np.where(skips > 0, np.nan, 1))
    norms = run["watch/grad_norm"]
    seen = {"grad_norm": norms, "steps": skips, "consecutive": skips}
    seen |= {"fraction": skips / np.arange(1, steps + 1), "last_reason": reason * (skips > 0)}
    # The clip inside the wrapper does not change: it is as at its last step, or as it began.
    inside = {"clip/clipped": 1.0, "clip/grad_norm": 2.0, "clip/bound": 1.0}
    frozen = {key: np.full(steps, x) for key, x in inside.items()}
    frozen |= {f"skip/{key}": np.asarray(x, float) for key, x in seen.items()}
    return run | frozen | {"skip/bound": np.full(steps, 0.1), "param_norm": np.full(steps, 10.0)}


HEALTHY = {
    "constant": healthy,
    "decaying": decaying,
    "large at first": falling_at_first,
    "log-normal tails": lognormal_tails,
    "power-law tails": pareto_tails,
    "warm-up": warm_up,
    "restarts": restart,
    "LoRA": lora,
    "float16, loss scale": loss_scale,
    "float16, growing scale": scale_grows,
    "converged": converged,
    "full batch": full_batch,
    "rare expert": rare_expert,
}

# What part of a run a window covers, and where it lies: from the first step to the last.
WINDOWS = [(share, place) for share in (0.2, 0.4, 0.7) for place in (0.0, 0.05, 0.2, 0.5, 1.0)]


def windows_of(run: Run) -> list[Run]:
    """What is left of a run of which only some steps were kept, at least 40 of them."""
    steps = len(run["loss"])
    sizes = [max(int(share * steps), 40) for share, _ in WINDOWS]
    starts = [int(at * (steps - size)) for size, (_, at) in zip(sizes, WINDOWS, strict=True)]
    cuts = [slice(at, at + size) for at, size in zip(starts, sizes, strict=True)]
    return [{key: x[cut] for key, x in run.items()} for cut in cuts]


_EXPLOSIONS = {
    f"explosion, {length} steps, {end}": Case(
        partial(explosion, length=length, end=end),
        "norms-jumped" if (end, length) == ("plateau", 2) else "norms-exploding",
        VANISHING | BROKEN | {"heavy-tail", "clip-always-active"},
        True,
    )
    for length in (2, 5, 20, 200)
    for end in ("nan", "inf", "plateau")
}

CASES = {
    **{name: Case(draw, SILENT) for name, draw in HEALTHY.items()},
    **_EXPLOSIONS,
    "lasting jump": Case(jump, "norms-jumped", VANISHING | BROKEN | {"heavy-tail"}),
    "lone spike": Case(spike, "spike", VANISHING | EXPLODING | BROKEN | {"heavy-tail"}, True),
    "one bad batch": Case(
        partial(spike, losses=True), "spike", VANISHING | EXPLODING | BROKEN | {"heavy-tail"}, True
    ),
    "burst of spikes": Case(burst, "spike-burst", VANISHING | EXPLODING | BROKEN),
    "heavy tail": Case(heavy, "heavy-tail", VANISHING | EXPLODING | BROKEN),
    "NaN in the data": Case(bad_data, "loss-not-finite", VANISHING | EXPLODING),
    "NaN in one layer": Case(bad_layer, "norm-not-finite", VANISHING | EXPLODING, True),
    "log(0)": Case(log_of_zero, "loss-not-finite", VANISHING | EXPLODING),
    "float16, no loss scale": Case(overflow, "norm-overflow", VANISHING | EXPLODING),
    "float16, one overflow": Case(
        partial(bad_layer, first=np.inf), "norm-overflow", VANISHING | EXPLODING, True
    ),
    "sigmoids in depth": Case(deep, "norms-fall-with-depth", EXPLODING | BROKEN),
    "plain RNN fades": Case(recurrent, "norms-vanishing", EXPLODING | BROKEN),
    "dead layer": Case(dead, "layer-dead", EXPLODING | BROKEN | {"zero-gradients"}, True),
    "dying layer": Case(dying, "layer-dead", EXPLODING | BROKEN | {"zero-gradients"}, True),
    "frozen layer": Case(frozen, "layer-frozen", EXPLODING | BROKEN | {"zero-gradients"}, True),
    "zero gradients": Case(all_zero, "zero-gradients", EXPLODING | BROKEN | {"spike"}),
    "learning rate too high": Case(rate_too_high, "learning-rate-too-high", VANISHING | BROKEN),
    "unstable steps": Case(unstable, "learning-rate-too-high", VANISHING | BROKEN),
    "learning rate too low": Case(rate_too_low, "learning-rate-too-low", EXPLODING | BROKEN),
    "stuck": Case(stuck, "loss-not-moving", EXPLODING | BROKEN),
    "bound too low": Case(bound_too_low, "clip-always-active", EXPLODING | VANISHING | BROKEN),
    "bound too high": Case(bound_too_high, "clip-never-active", EXPLODING | VANISHING | BROKEN),
    "clip before the mean": Case(clip_before_mean, "clip-before-averaging", EXPLODING | VANISHING),
    "all steps skipped": Case(
        skipped, "every-step-skipped", EXPLODING | VANISHING | {"clip-always-active"}
    ),
}
