"""The linter finds every planted mistake, and reports nothing for its fix or for sound chains."""

import functools
import inspect
import pathlib
import re

import equinox
import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip as oc
from optaxclip import actions, scopes, thresholds
from optaxclip.checking.chains import read_chain
from optaxclip.checking.check import _RULES
from tests.cases import ADAPTIVE, CASES, HOLDERS, OTHERS

PARAMS = {"encoder": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "head": {"w": jnp.ones((2, 2))}}
ENCODER = {"encoder": True, "head": False}
HEAD = {"encoder": False, "head": True}
LABELS = {"encoder": "encoder", "head": "head"}
GLOBAL = {"optax": optax.clip_by_global_norm, "ours": oc.clip_by_global_norm}
clip, inject, chain = oc.clip_by_global_norm, optax.inject_hyperparams, optax.chain
ADAM = optax.adam(1e-3)


def by_module(params):
    return {
        module: jax.tree.map(lambda _, name=module: name, inner) for module, inner in params.items()
    }


def accumulated(tx):
    return optax.MultiSteps(tx, 4).gradient_transformation()


def branches(first, second, labels=LABELS):
    return optax.partition({"encoder": first, "head": second}, labels)


def clipped(optimizer, c=clip, bound=1.0):
    return chain(c(bound), optimizer)


def mean(c=None):
    return oc.aggregation.clipped_mean(clip(1.0) if c is None else c, "clients")


def centered(c=None):
    return oc.aggregation.centered_clip(clip(1.0) if c is None else c, "clients")


GUARDS = [oc.skip_nonfinite, oc.skip_spikes]


def names(tx, params=PARAMS):
    return [finding.name for finding in oc.check(tx, params)]


# name -> [(the mistake, its fix)]
MISTAKES = {
    "clip-per-branch": [
        *[
            (
                branches(clipped(optax.adam(1e-3), c), clipped(optax.sgd(1.0), c)),
                chain(c(1.0), branches(optax.adam(1e-3), optax.sgd(1.0))),
            )
            for c in GLOBAL.values()
        ],
        (
            chain(
                branches(
                    clipped(optax.adam(1e-3)), chain(chain(clip(1.0)), optax.sgd(1.0)), by_module
                ),
                optax.scale(0.5),
            ),
            chain(
                oc.clip_by_group_norm(1.0, lambda path: path.split("/")[0]),
                branches(optax.adam(1e-3), optax.sgd(1.0)),
            ),
        ),
        (
            chain(
                optax.masked(clipped(optax.adam(1e-3)), ENCODER),
                optax.masked(clipped(optax.sgd(1.0)), HEAD),
            ),
            chain(
                clip(1.0),
                optax.masked(optax.adam(1e-3), ENCODER),
                optax.masked(optax.sgd(1.0), HEAD),
            ),
        ),
        (
            branches(
                chain(inject(clip)(1.0), optax.adam(1e-3)),
                clipped(optax.sgd(1.0), optax.clip_by_global_norm),
            ),
            branches(optax.adam(1e-3), clipped(optax.sgd(1.0))),
        ),
    ],
    "frozen-in-norm": [
        *[
            (
                chain(c(1.0), branches(optax.adam(1e-3), optax.set_to_zero())),
                branches(clipped(optax.adam(1e-3), c), optax.set_to_zero()),
            )
            for c in (*GLOBAL.values(), lambda bound: oc.zclip())
        ],
        (
            chain(clip(1.0), optax.adam(1e-3), optax.freeze(HEAD)),
            chain(optax.freeze(HEAD), clip(1.0), optax.adam(1e-3), optax.freeze(HEAD)),
        ),
        (
            optax.named_chain(
                ("clip", clip(1.0)), ("train", branches(optax.sgd(1.0), optax.sgd(0.0), by_module))
            ),
            chain(clip(1.0, exclude="head"), branches(optax.sgd(1.0), optax.set_to_zero())),
        ),
        (
            chain(mean(), optax.freeze(HEAD)),
            chain(mean(clip(1.0, exclude="head")), optax.freeze(HEAD)),
        ),
        (
            oc.skip_spikes(branches(optax.adam(1e-3), optax.set_to_zero())),
            oc.skip_spikes(branches(optax.adam(1e-3), optax.set_to_zero()), exclude="head"),
        ),
        (
            chain(
                inject(optax.clip_by_global_norm)(1.0),
                optax.selective_transform(optax.adam(1e-3), freeze_mask=HEAD),
            ),
            optax.selective_transform(clipped(optax.adam(1e-3)), freeze_mask=HEAD),
        ),
    ],
    "clip-after-normaliser": [
        *[
            (chain(optimizer, c(1.0)), chain(c(1.0), optimizer))
            for c in (
                *GLOBAL.values(),
                optax.clip,
                oc.clip,
                oc.clip_by_leaf_norm,
                oc.smooth_clip,
                functools.partial(clip, eps=1e-6, min_norm=1e-3),
                lambda bound: oc.clip_by_leaf_norm(jax.tree.map(lambda _: bound, PARAMS)),
                lambda bound: oc.clip_by_group_norm(bound, lambda path: "all"),
                lambda bound: oc.clip_by(bound, scope=scopes.groups(lambda path: path)),
            )
            for optimizer in (optax.adamw(1e-3), optax.lion(1e-4))
        ],
        (
            chain(
                optax.scale_by_adam(),
                inject(optax.clip_by_global_norm)(lambda step: 1.0),
                optax.scale(-1e-3),
            ),
            chain(optax.scale_by_adam(), oc.clip_by_block_rms(1.0), optax.scale(-1e-3)),
        ),
        (
            chain(accumulated(optax.adam(1e-3)), clip(1.0)),
            accumulated(chain(clip(1.0), optax.adam(1e-3))),
        ),
        (
            optax.apply_if_finite(
                chain(chain(chain(optax.rmsprop(1e-3)), optax.named_chain(("c", clip(1.0))))), 5
            ),
            optax.apply_if_finite(chain(chain(optax.rmsprop(1e-3)), oc.limit_norm_growth()), 5),
        ),
        (
            chain(branches(optax.adam(1e-3), optax.sgd(1.0)), clip(1.0)),
            chain(clip(1.0), branches(optax.adam(1e-3), optax.sgd(1.0))),
        ),
        (
            chain(inject(optax.adam)(lambda step: 1e-3), clip(1.0)),
            chain(clip(1.0), inject(optax.adam)(1e-3)),
        ),
    ],
    "spike-test-after-clip": [
        *[
            (chain(c(1.0), adaptive(), optax.sgd(1.0)), chain(adaptive(), c(1.0), optax.sgd(1.0)))
            for c in GLOBAL.values()
            for adaptive in (oc.zclip, oc.autoclip, oc.quantile_clip, oc.clip_by_log_zscore)
        ],
        *[
            (
                chain(c(1.0), oc.skip_spikes(optax.adam(1e-3))),
                oc.skip_spikes(chain(c(1.0), optax.adam(1e-3))),
            )
            for c in GLOBAL.values()
        ],
        (
            chain(inject(clip)(1.0), chain(oc.skip_spikes(optax.adam(1e-3), 10.0))),
            chain(oc.skip_spikes(chain(inject(clip)(1.0), optax.adam(1e-3)), 10.0)),
        ),
    ],
    "watch-after-clip": [
        *[
            (chain(c(1.0), oc.watch(), optax.sgd(1.0)), chain(oc.watch(), c(1.0), optax.sgd(1.0)))
            for c in GLOBAL.values()
        ],
        (
            chain(inject(clip)(1.0), oc.skip_nonfinite(chain(oc.watch(top=1), ADAM))),
            chain(oc.watch(), inject(clip)(1.0), oc.watch(), oc.skip_nonfinite(ADAM)),
        ),
        (
            chain(clip(1.0), chain(oc.zclip(max_norm=0.5, scope=scopes.leaf), oc.watch()), ADAM),
            chain(clip(1.0), ADAM, oc.watch()),
        ),
    ],
    "clip-before-accumulation": [
        *[
            (chain(c, accumulated(optax.sgd(1.0))), accumulated(chain(c, optax.sgd(1.0))))
            for c in (
                clip(1.0),
                optax.clip(1.0),
                optax.adaptive_grad_clip(0.1),
                oc.adaptive_grad_clip(0.1),
                oc.zclip(),
            )
        ],
        (
            chain(
                chain(optax.identity(), optax.clip_by_block_rms(1.0)),
                chain(accumulated(optax.adam(1e-3))),
            ),
            chain(accumulated(chain(optax.clip_by_block_rms(1.0), optax.adam(1e-3)))),
        ),
    ],
    "guard-after-clip": [
        *[
            (chain(c, guard(optax.adam(1e-3))), guard(chain(c, optax.adam(1e-3))))
            for c in (
                optax.clip(1.0),
                oc.clip_by_value(-1.0, 1.0),
                oc.spam_clip(),
                oc.clip(1.0),
                clip(1.0, nonfinite="zero"),
                oc.zclip(nonfinite="zero"),
                optax.zero_nans(),
            )
            for guard in (oc.skip_nonfinite, lambda tx: optax.apply_if_finite(tx, 5))
        ],
        (
            chain(inject(optax.clip)(1.0), optax.apply_if_finite(optax.adam(1e-3), 5)),
            chain(clip(1.0), optax.apply_if_finite(optax.adam(1e-3), 5)),
        ),
    ],
    "guard-without-optimizer": [
        (chain(guard(c(1.0)), optax.adam(1e-3)), guard(chain(c(1.0), optax.adam(1e-3))))
        for c in GLOBAL.values()
        for guard in (
            oc.skip_nonfinite,
            oc.skip_spikes,
            lambda tx: optax.apply_if_finite(chain(tx), 5),
        )
    ],
    "guard-in-accumulation": [
        *[
            (accumulated(guard(optax.adam(1e-3))), guard(accumulated(optax.adam(1e-3))))
            for guard in (
                oc.skip_nonfinite,
                oc.skip_spikes,
                lambda tx: chain(optax.apply_if_finite(tx, 5)),
            )
        ],
        *[
            (accumulated(clipped(optax.adam(1e-3), c)), accumulated(clipped(optax.adam(1e-3))))
            for c in (lambda bound: clip(bound, nonfinite="zero"), lambda bound: optax.zero_nans())
        ],
        *[
            (
                optax.MultiSteps(guard(optax.adam(1e-3)), 2),
                optax.MultiSteps(
                    guard(optax.adam(1e-3)), 2, should_skip_update_fn=optax.skip_not_finite
                ),
            )
            for guard in (oc.skip_nonfinite, oc.skip_spikes)
        ],
    ],
    "clip-before-unscale": [
        *[
            (
                chain(c(1.0), optax.scale(2.0**-15), optax.adam(1e-3)),
                chain(optax.scale(2.0**-15), c(1.0), optax.adam(1e-3)),
            )
            for c in (*GLOBAL.values(), optax.clip, oc.clip, oc.clip_by_leaf_norm)
        ],
        (
            chain(oc.zclip(), clip(1.0), chain(optax.scale(1 / 1024), optax.scale_by_lion())),
            chain(oc.zclip(), optax.scale(1 / 1024), clip(1.0), optax.scale_by_lion()),
        ),
    ],
    "clip-before-sign": [
        *[
            (
                chain(c(1.0), optax.sign_sgd(1e-3)),
                chain(c(1.0), optax.trace(0.9), optax.sign_sgd(1e-3)),
            )
            for c in (*GLOBAL.values(), optax.clip, oc.clip_by_leaf_norm)
        ],
        (
            chain(clip(1.0), optax.normalize_by_update_norm()),
            chain(oc.clip_by_leaf_norm(1.0), optax.normalize_by_update_norm()),
        ),
    ],
    "clip-twice": [
        *[
            (chain(c(1.0), d(2.0), optax.sgd(1.0)), chain(c(1.0), optax.sgd(1.0)))
            for c in GLOBAL.values()
            for d in GLOBAL.values()
        ],
        (chain(clip(2.0), chain(clip(1.0), optax.adam(1e-3))), chain(clip(1.0), optax.adam(1e-3))),
    ],
    "idle-exclude": [
        (chain(make(exclude=wrong), optax.sgd(1.0)), chain(make(exclude="^head/"), optax.sgd(1.0)))
        for make in (
            functools.partial(clip, 1.0),
            functools.partial(oc.adaptive_grad_clip, 0.1),
            oc.zclip,
            functools.partial(oc.clip, 1.0),
            functools.partial(oc.u_clip, 1.0),
            oc.spam_clip,
            oc.scale_by_acclip,
            functools.partial(oc.skip_nonfinite, optax.sgd(1.0)),
            functools.partial(oc.skip_spikes, optax.sgd(1.0)),
        )
        for wrong in ("^haed/", "", lambda path: False)
    ],
    "clip-before-aggregation": [
        (chain(c, make(), optax.sgd(1.0)), chain(make(c), optax.sgd(1.0)))
        for make in (mean, centered)
        for c in (oc.clip_by_leaf_norm(1.0), oc.zclip(), oc.clip_by_momentum_norm(), clip(1.0))
    ],
    "guard-around-aggregation": [
        (guard(chain(make(), ADAM)), chain(make(), guard(ADAM)))
        for guard in (functools.partial(optax.apply_if_finite, max_consecutive_errors=5), *GUARDS)
        for make in (mean, centered)
    ],
    "aggregation-after-normaliser": [
        (chain(tx, make()), chain(make(), tx))
        for make in (mean, centered)
        for tx in (ADAM, optax.lion(1e-3), optax.scale_by_sign())
    ],
    "optimizer-as-threshold": [
        (make(optimizer), chain(make(1.0), optimizer))
        for make in (oc.clip_by, oc.clip_by_leaf_norm, oc.clip, oc.u_clip)
        # All other optimizers are rejected when the clip is built.
        for optimizer in (optax.inject_hyperparams(optax.sgd)(0.1),)
    ],
    "threshold-as-clip": [
        (chain(t, optax.sgd(1.0)), chain(oc.clip_by(t), optax.sgd(1.0)))
        for t in (
            thresholds.running(1.5),
            thresholds.at_most(thresholds.percentile(90), 1.0),
            thresholds.constant(1.0),
            thresholds.lag(optax.ema(0.9)),
            thresholds.scheduled(lambda step: 1.0),
            thresholds.until(5, 1.0),
            thresholds.param_relative(0.1),
            thresholds.at_least(thresholds.param_relative(0.1), 1.0),
            thresholds.per_block(0.0, lambda norm, state: (norm, state)),
        )
    ],
}
PLANTED = [(name, *pair) for name, pairs in MISTAKES.items() for pair in pairs]


def test_every_finding_is_planted_and_documented():
    page = pathlib.Path(__file__).parent.parent / "docs" / "check.md"
    rows = re.findall(r"^\| `([a-z-]+)` \|", page.read_text(), re.MULTILINE)
    assert rows == list(_RULES)
    assert sorted(rows) == sorted(MISTAKES)


@pytest.mark.parametrize(
    ("name", "mistake", "fix"), PLANTED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(PLANTED)]
)
def test_each_planted_mistake_is_found_and_its_fix_is_silent(name, mistake, fix):
    assert names(mistake) == [name]
    assert names(fix) == []


WRAPPERS = {
    "chain": lambda tx: chain(optax.identity(), chain(tx)),
    "named": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    "finite": lambda tx: optax.apply_if_finite(tx, 5),
    "skip": oc.skip_nonfinite,
    "reset": oc.reset_moments,
    "accumulated": accumulated,
    "object": lambda tx: optax.MultiSteps(tx, 2),
    "injected": lambda tx: inject(lambda rate: chain(tx, optax.scale(rate)))(0.1),
    "jitted": lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update)),
    "masked": lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, PARAMS)),
    "partitioned": lambda tx: optax.partition(
        {"all": tx}, lambda params: jax.tree.map(lambda _: "all", params)
    ),
    "flat": optax.flatten,
    "extra arguments": optax.with_extra_args_support,
    "lookahead": lambda tx: optax.lookahead(tx, 5, 0.5),
    "mechanize": optax.contrib.mechanize,
    "schedule-free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "complex": optax.contrib.split_real_and_imaginary,
    "for some steps": lambda tx: optax.conditionally_mask(tx, lambda step: step < 9),
    "foreign": lambda tx: foreign(tx),
}
# The first and the last example of each mistake: usually one with a clip of Optax, one with ours.
ENDS = [(name, i) for name in MISTAKES for i in (0, -1)]
WITH_A_GUARD = {("spike-test-after-clip", -1), ("idle-exclude", -1)}


@pytest.mark.parametrize(("name", "which"), ENDS, ids=[f"{name}{i}" for name, i in ENDS])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_mistake_is_found_inside_every_wrapper(wrapper, name, which):
    found, guarded = {name}, wrapper in ("finite", "skip")
    # A guard inside MultiSteps is another mistake, unless there is also one around it.
    if wrapper in ("accumulated", "object") and ("guard" in name or (name, which) in WITH_A_GUARD):
        found.add("guard-in-accumulation")
    if guarded and "aggregation" in name:
        found.add("guard-around-aggregation")
    if guarded and name == "guard-in-accumulation":
        found.clear()
    assert sorted(names(WRAPPERS[wrapper](MISTAKES[name][which][0]))) == sorted(found)


def foreign(tx):
    """A wrapper that `check` cannot read, and which may change gradients and updates."""

    def update(updates, state, params=None):
        return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, functools.wraps(tx.update)(update))


MUON = optax.contrib.muon(1e-3)
SOUND = {
    "adamw": chain(clip(1.0), optax.adamw(1e-3)),
    "masked decay": chain(
        clip(1.0), optax.adamw(1e-3, mask={"encoder": {"w": True, "b": False}, "head": True})
    ),
    "decay masked by function": chain(
        clip(1.0), optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    ),
    "nested": chain(
        chain(optax.zero_nans(), chain(clip(1.0))),
        chain(chain(optax.scale_by_adam()), optax.scale(-1e-3)),
    ),
    "inject": inject(lambda rate: chain(clip(1.0), optax.adamw(rate)))(
        optax.cosine_decay_schedule(1e-3, 100)
    ),
    "inject inside": chain(inject(clip)(1.0), inject(optax.adamw)(1e-3)),
    "MultiSteps": accumulated(chain(clip(1.0), ADAM)),
    "MultiSteps object": optax.MultiSteps(chain(clip(1.0), ADAM), 2),
    "skip_spikes": oc.skip_spikes(chain(clip(1.0), ADAM)),
    "skip of skip": oc.skip_nonfinite(oc.skip_spikes(chain(oc.zclip(), clip(1.0), ADAM))),
    "lookahead": optax.lookahead(chain(clip(1.0), ADAM), 5, 0.5),
    "schedule_free": optax.contrib.schedule_free(chain(clip(1.0), optax.sgd(0.1)), 0.1),
    "schedule_free outside": chain(clip(1.0), optax.contrib.schedule_free_adamw(1e-3)),
    "sam": chain(
        clip(1.0), optax.contrib.sam(ADAM, chain(optax.contrib.normalize(), optax.sgd(0.05)))
    ),
    "mechanize": optax.contrib.mechanize(chain(clip(1.0), ADAM)),
    "adafactor": chain(clip(1.0), optax.adafactor(1e-3)),
    "adafactor by hand": chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale(-1e-3)
    ),
    "block rms of updates": chain(
        optax.scale_by_adam(), oc.clip_by_block_rms(1.0), optax.scale(-1e-3)
    ),
    "elements of updates": chain(optax.scale_by_adam(), optax.clip(1.0), optax.scale(-1e-3)),
    "norm growth": chain(
        clip(1.0), optax.scale_by_adam(), oc.limit_norm_growth(), optax.scale(-1e-3)
    ),
    "growth of a clipped norm": chain(clip(1.0), oc.limit_norm_growth(), optax.sgd(0.1)),
    "spectral": chain(optax.scale_by_adam(), oc.spectral_clip(1.0), optax.scale(-1e-3)),
    "clippy": chain(optax.scale_by_adam(), oc.clippy(), optax.scale(-1e-3)),
    "larc": chain(oc.larc(0.1), optax.sgd(0.1, momentum=0.9)),
    "larc on updates": chain(optax.scale_by_adam(), oc.larc(0.1), optax.scale(-0.1)),
    "agc on updates": chain(ADAM, optax.adaptive_grad_clip(0.01)),
    "stable_adamw": chain(clip(1.0), oc.stable_adamw(1e-3)),
    "stable_spam": oc.stable_spam(1e-3)
    if "learning_rate" in inspect.signature(oc.stable_spam).parameters
    else oc.stable_spam(),
    "reset": oc.reset_moments(chain(clip(1.0), ADAM), every=10),
    "spam": chain(oc.spam_clip(), oc.reset_moments(ADAM, every=10)),
    "cap behind": chain(oc.zclip(), clip(10.0), ADAM),
    "lion": chain(
        clip(1.0), optax.lion(1e-4)
    ),  # the momentum remembers a spike, which the clip bounds
    "muon": chain(clip(1.0), MUON),
    "signum": chain(clip(1.0), optax.trace(0.9), optax.sign_sgd(1e-3)),
    "decay between clip and sign": chain(
        clip(1.0), optax.add_decayed_weights(0.1), optax.sign_sgd(1e-3)
    ),
    "sign of some": chain(clip(1.0), branches(optax.sign_sgd(1e-3), ADAM)),
    "adaptive twice": chain(oc.adagc(), ADAM),
    "tree, then elements": chain(clip(1.0), optax.clip(0.1), ADAM),
    "leaf, then tree": chain(oc.clip_by_leaf_norm(1.0), clip(2.0), ADAM),
    "different leaves": chain(clip(1.0, exclude="head"), clip(1.0, exclude="encoder"), ADAM),
    "different norms": chain(clip(1.0), clip(1.0, norm=1), ADAM),
    "measures, then clips": chain(clip(jnp.inf), clip(1.0), ADAM, clip(jnp.inf)),
    "warm-up and cap": chain(clip(optax.linear_schedule(0.1, 1.0, 10)), clip(0.5), ADAM),
    "groups by design": branches(clip(1.0), clip(1.0)),
    "groups by design, in a chain": chain(branches(clip(1.0), clip(1.0)), ADAM),
    "bounds of their own": branches(clipped(ADAM), clipped(optax.sgd(0.1), bound=0.5)),
    "adaptive branches": branches(chain(oc.zclip(), ADAM), chain(oc.zclip(), optax.sgd(0.1))),
    "clip of one branch": branches(clipped(ADAM), optax.sgd(0.1)),
    "clip of one branch, the rest frozen": branches(clipped(ADAM), optax.set_to_zero()),
    "an empty branch": optax.partition(
        {"a": clipped(ADAM), "b": clipped(MUON)}, lambda p: jax.tree.map(lambda _: "a", p)
    ),
    "masked clip": chain(optax.masked(clip(1.0), ENCODER), ADAM),
    "frozen, leaf by leaf": chain(oc.clip_by_leaf_norm(1.0), branches(ADAM, optax.set_to_zero())),
    "frozen before": chain(optax.freeze(HEAD), clip(1.0), ADAM, optax.freeze(HEAD)),
    "freezes none": chain(clip(1.0), ADAM, optax.freeze(False)),
    "freezes all": chain(clip(1.0), optax.freeze(jax.tree.map(lambda _: True, PARAMS))),
    "finite outside": optax.apply_if_finite(chain(optax.clip(1.0), ADAM), 5),
    "zeros inside": optax.apply_if_finite(chain(clip(1.0, nonfinite="zero"), ADAM), 5),
    "NaN through a clip": chain(clip(1.0), optax.apply_if_finite(ADAM, 5)),
    "NaN through a clip of Optax": chain(optax.clip_by_global_norm(1.0), oc.skip_nonfinite(ADAM)),
    "guarded clip, no memory": chain(optax.apply_if_finite(clip(1.0), 5), optax.scale(-0.1)),
    "labels that fail": chain(clip(1.0), branches(ADAM, optax.set_to_zero(), lambda p: p.nothing)),
    "a mask that fails": chain(clip(1.0), optax.masked(optax.set_to_zero(), lambda p: 1 / 0)),
    "a mask that does not fit": chain(
        clip(1.0), optax.masked(optax.set_to_zero(), [True, False, True])
    ),
    "behind a foreign wrapper": chain(foreign(ADAM), clip(1.0)),
    "in front of a foreign wrapper": chain(clip(1.0), foreign(optax.sign_sgd(1e-3))),
    "a method": optax.GradientTransformation(optax.EmptyState, dict.update),
    "a bound that may change": chain(
        clip(2.0), inject(clip)(1.0), inject(clip)(lambda step: 0.5), ADAM
    ),
    "a clip for some steps": chain(
        clip(2.0), optax.conditionally_transform(clip(1.0), lambda step: step < 9), ADAM
    ),
    "signs for some steps": chain(
        clip(2.0), optax.conditionally_transform(optax.sign_sgd(1.0), lambda step: step < 9)
    ),
    "a rate that starts at zero": chain(
        clip(1.0), branches(ADAM, inject(optax.sgd)(optax.linear_schedule(0.0, 1.0, 10)))
    ),
    "a wrapper around our clip": chain(ADAM, foreign(clip(1.0))),
    "a compiled wrapper around our clip": chain(
        ADAM, optax.GradientTransformation(clip(1.0).init, jax.jit(foreign(clip(1.0)).update))
    ),
    "stateless": chain(clip(1.0), optax.stateless(lambda updates, params: updates), ADAM),
    "a share of the norm": chain(oc.clip_by(optax.scale_by_schedule(lambda step: 0.5)), ADAM),
    "a threshold of Optax's": chain(
        oc.clip_by(thresholds.lag(chain(optax.ema(0.9), optax.scale(2.0)))), ADAM
    ),
    "an average before Adam": chain(clip(1.0), optax.scale(1 / 3), ADAM),
    "a rate that is a power of two": chain(clip(1.0), optax.scale(2.0**-7), optax.scale(-1.0)),
    "an adaptive clip of scaled gradients": chain(oc.zclip(), optax.scale(2.0**-15), ADAM),
    "unscaled, then clipped": chain(optax.scale(2.0**-15), clip(1.0), ADAM),
    "a scale that may change": chain(clip(1.0), inject(optax.scale)(2.0**-15), ADAM),
    "skips the mean": optax.MultiSteps(
        oc.skip_spikes(chain(clip(1.0), ADAM)), 4, should_skip_update_fn=optax.skip_not_finite
    ),
    "skips with an exclude": oc.skip_spikes(chain(clip(1.0), ADAM), exclude="^head/"),
    "u_clip of signs": chain(oc.u_clip(1.0), optax.sign_sgd(1e-3)),  # it has a memory
    "one limit": chain(oc.clip_by_value(-1.0, jnp.inf), oc.skip_nonfinite(ADAM)),
    "normalised updates": chain(
        optax.scale_by_adam(), oc.clip_by(1.0, action=actions.normalize), optax.scale(-1e-3)
    ),
    "largest element of updates": chain(
        optax.scale_by_adam(), clip(1.0, norm=jnp.inf), optax.scale(-1e-3)
    ),
    "stable_spam's normalisation": chain(clip(1.0), oc.normalize_by_moments(), ADAM),
    "zeroes, then signs": chain(oc.clip_by(1.0, action=actions.zero), optax.sign_sgd(1e-3)),
    "guards inside and outside": oc.skip_nonfinite(accumulated(oc.skip_nonfinite(ADAM))),
    "skips micro-batches": oc.skip_spikes(accumulated(chain(clip(1.0), ADAM))),
    "skip_nonfinite sees the frozen": oc.skip_nonfinite(branches(ADAM, optax.set_to_zero())),
    "ema": chain(clip(1.0), ADAM, optax.ema(0.99)),
    "apply_every": chain(clip(1.0), ADAM, optax.apply_every(2)),
    "noise": chain(clip(1.0), optax.add_noise(0.1, 0.5, key=jax.random.key(0)), ADAM),
    "plateau": chain(clip(1.0), ADAM, optax.contrib.reduce_on_plateau()),
    "sometimes": chain(optax.conditionally_transform(clip(1.0), lambda step: step < 10), ADAM),
    "monitor": chain(optax.monitor({"norm": clip(1.0)}), ADAM)
    if hasattr(optax, "monitor")
    else ADAM,
    "dp": optax.contrib.differentially_private_aggregate(1.0, 0.1, 0),
    "lbfgs": optax.lbfgs(),
    "lamb": chain(clip(1.0), optax.lamb(1e-3)),
    "steps are watched": chain(clip(1.0), optax.sgd(0.1), oc.watch()),
    "a watch of what is not clipped": chain(clip(1.0, exclude="head"), oc.watch(), ADAM),
    "a watch of a clip by leaf": chain(oc.clip_by_leaf_norm(1.0), oc.watch(), ADAM),
    "a watch of an infinite bound": chain(clip(jnp.inf), oc.watch(), ADAM),
    "a mean, and then a wider clip": chain(mean(), clip(2.0), ADAM),
    "a mean, and then a narrower clip": chain(mean(), clip(0.5), ADAM),
    "a mean, and then signs": chain(mean(), optax.sign_sgd(1e-3)),
    "a mean, and then a test for spikes": chain(centered(), oc.skip_spikes(ADAM)),
    "a mean, and then a watch": chain(centered(), oc.watch(), ADAM),
    "a mean of values, and then a guard": chain(mean(oc.clip(1.0)), oc.skip_nonfinite(ADAM)),
    "a mean of each micro-batch": chain(mean(), accumulated(ADAM)),
    "a mean of each branch": branches(mean(), mean()),
    "each client's own norm, by Optax": chain(optax.clip_by_global_norm(1.0), centered(), ADAM),
    "each client's values": chain(
        oc.clip(1.0), oc.clip_by(1.0, scope=scopes.element), mean(), ADAM
    ),
    "each client's momentum": chain(optax.ema(0.9), mean(), ADAM),
    "a client's frozen leaves": chain(optax.freeze(HEAD), mean(), ADAM, optax.freeze(HEAD)),
    "two optimizers": branches(MUON, ADAM),
    "muon and Adam, clipped": chain(clip(1.0), branches(MUON, ADAM)),
}


@pytest.mark.parametrize("name", SOUND)
def test_silent_on_sound_chains(name):
    assert oc.check(SOUND[name], PARAMS) == ()


@pytest.mark.parametrize("name", MISTAKES)
def test_shapes_are_enough_and_nothing_is_computed(name):
    shapes = jax.eval_shape(lambda: PARAMS)
    mistake = MISTAKES[name][0][0]
    assert oc.check(mistake, shapes) == oc.check(mistake, PARAMS) != ()


def test_reads_well():
    (finding,) = oc.check(chain(ADAM, clip(1.0)), PARAMS)
    assert finding.where == "chain[1]/clip_by_global_norm"
    assert finding.fix.startswith("the clip before it, optax.chain(clip, optimizer)")
    assert str(finding).startswith(
        "clip-after-normaliser, at chain[1]/clip_by_global_norm: it clips updates that"
        " chain[0]/chain[0]/scale_by_adam"
    )
    (finding,) = oc.check(MISTAKES["frozen-in-norm"][0][0], PARAMS)
    assert "(head/w)" in finding.what


def test_accumulation_separates_two_clips():
    """The mean of clipped gradients is not a clipped gradient: neither clip is idle."""
    for inside in (clipped(optax.sgd(1.0)), optax.sign_sgd(1.0)):
        assert names(chain(clip(2.0), accumulated(inside))) == ["clip-before-accumulation"]


LATE = chain(ADAM, clip(1.0))
WITH_GRADIENTS = {
    "array": jnp.ones(2),
    "None and int": {"a": jnp.ones(2), "b": None, "c": jnp.ones(2, int)},
    "tuples": [(jnp.ones(()),)],
    "key": {"a": jnp.ones(2), "key": jax.random.key(0)},
    "equinox": equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)),
    "strings and functions": {"a": jnp.ones(2), "name": "x", "f": jnp.tanh, "n": 3},
}
WITHOUT_GRADIENTS = {
    "empty": {},
    "None": None,
    "of None": {"a": None},
    "of int": {"a": jnp.ones(2, int)},
}


@pytest.mark.parametrize("kind", WITH_GRADIENTS)
def test_odd_trees(kind):
    assert names(LATE, WITH_GRADIENTS[kind]) == ["clip-after-normaliser"]


@pytest.mark.parametrize("kind", WITHOUT_GRADIENTS)
def test_trees_without_gradients(kind):
    assert names(LATE, WITHOUT_GRADIENTS[kind]) == []


@pytest.mark.parametrize("name", SOUND)
def test_an_unfiltered_model_does_not_fail(name):
    """Masks and labels are evaluated on its functions and strings too."""
    model = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    oc.check(SOUND[name], model)


def test_masks_of_an_unfiltered_model():
    model = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    frozen = chain(
        clip(1.0),
        ADAM,
        optax.masked(
            optax.set_to_zero(), lambda m: jax.tree.map(lambda x: getattr(x, "ndim", 0) == 1, m)
        ),
    )
    (finding,) = oc.check(frozen, model)
    assert finding.name == "frozen-in-norm"
    assert "(layers/0/bias, layers/1/bias)" in finding.what
    assert names(chain(clip(1.0, exclude="bais"), ADAM), model) == ["idle-exclude"]


def test_a_transformation_that_holds_itself():
    def around(tx):
        held = {}

        def update(updates, state, params=None):
            return held["tx"].update(updates, state, params)

        held |= {"late": tx, "tx": optax.GradientTransformation(tx.init, update)}
        return held["tx"]

    assert set(names(around(LATE))) == {"clip-after-normaliser"}


def test_bounds_may_be_tracers():
    @jax.jit
    def step(bound):
        tx = chain(clip(bound), optax.clip_by_global_norm(bound), ADAM, clip(bound))
        assert names(tx) == ["clip-after-normaliser"]
        return bound

    step(1.0)


def test_only_transformations():
    with pytest.raises(TypeError, match="check: tx must be an optax transformation, got float"):
        oc.check(1.0, PARAMS)
    for maker in (oc.zclip, optax.adam):
        with pytest.raises(TypeError, match=rf"write {maker.__name__}\(\.\.\.\), with parentheses"):
            oc.check(maker, PARAMS)


def _made(make):
    """An optimizer of Optax that needs only a learning rate; None for anything else."""
    try:
        required = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
        return make(0.1) if [p.name for p in required] == ["learning_rate"] else None
    except (TypeError, ValueError, UserWarning, DeprecationWarning):
        return None


OPTIMIZERS = {
    name: tx
    for m in (optax, optax.contrib)
    for name, make in vars(m).items()
    if (tx := _made(make))
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_silent_on_a_clip_before_every_optimizer_but_that_of_signs(name):
    tx, expected = OPTIMIZERS[name], ["clip-before-sign"] if name in ("sign_sgd", "signsgd") else []
    assert names(tx) == []
    assert (
        names(chain(clip(1.0), tx)) == names(chain(optax.clip_by_global_norm(1.0), tx)) == expected
    )
    assert names(oc.skip_spikes(chain(oc.zclip(), tx))) == []


ALL = {case.name: lambda case=case: case.make(1.0) for case in CASES} | {
    case.name: case.make for case in ADAPTIVE
}


@pytest.mark.parametrize("name", ALL | OTHERS | HOLDERS)
def test_each_of_ours_describes_itself(name):
    """So `check` need not read its closures."""
    tx = (ALL | OTHERS | HOLDERS)[name]()
    about = tx.update.description if hasattr(tx.update, "description") else None
    nodes, public = read_chain(tx, PARAMS), vars(oc) | vars(oc.wrappers)
    described = [node.about.name for node in nodes if node.about is not None]
    assert described and all(name in public for name in described)
    # Of Optax's functions the arguments are read; of ours, some of which have the same names, not.
    others = [node for node in nodes if node.about is None]
    assert all(node.facts or node.name not in public for node in others)
    assert all(hasattr(optax, node.name) for node in others)
    assert about is None or nodes[0].about == about


@pytest.mark.parametrize("name", ALL | OTHERS | HOLDERS)
def test_silent_on_each_of_ours_before_adam(name):
    clip = (ALL | OTHERS | HOLDERS)[name]()
    assert names(clip) == names(chain(clip, optax.adamw(1e-3))) == []


def run(tx, *grads, params=PARAMS):
    """The updates of a few steps."""
    state, out, update = tx.init(params), [], jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it
        for g in grads:
            updates, state = update(g, state, params)
            out.append(updates)
    return out


def of(mistake):
    return MISTAKES[mistake][0]


def grads(encoder, head):
    return {
        "encoder": jax.tree.map(lambda x: x * encoder, PARAMS["encoder"]),
        "head": {"w": PARAMS["head"]["w"] * head},
    }


def norms(updates):
    return [round(float(optax.tree.norm(u)), 3) for u in updates]


@pytest.mark.slow
def test_each_finding_is_true():
    """The chains are run: the mistake has the effect that its finding states, the fix has not."""
    sgd, big, nan, inf = optax.sgd(1.0), grads(9.0, 9.0), grads(jnp.nan, 1.0), grads(jnp.inf, 1.0)
    per_branch, once = branches(clipped(sgd), clipped(sgd)), clipped(branches(sgd, sgd))
    assert (names(per_branch), norms(run(per_branch, big)), norms(run(once, big))) == (
        ["clip-per-branch"],
        [1.414],
        [1.0],
    )
    frozen = chain(clip(1.0), branches(sgd, optax.set_to_zero()))
    assert norms(run(frozen, grads(0.1, 99.0))) == [0.001]
    assert norms(run(branches(clipped(sgd), optax.set_to_zero()), grads(0.1, 99.0))) == [0.245]
    late = chain(optax.scale_by_adam(), clip(1.0))
    assert norms(run(late, grads(1e-6, 1e-6), grads(1e6, 1e6))) == [1.0, 1.0]
    for guard in (oc.skip_nonfinite, lambda tx: optax.apply_if_finite(tx, 5)):
        for hides, bad in (
            (optax.clip(1.0), inf),
            (oc.clip(1.0), inf),
            (clip(1.0, nonfinite="zero"), nan),
        ):
            momentum = optax.sgd(1.0, momentum=0.9)
            assert norms(run(chain(hides, guard(momentum)), big, bad))[1] > 0
            assert norms(run(guard(chain(hides, momentum)), big, bad))[1] == 0
        assert norms(run(chain(clip(1.0), guard(sgd)), big, nan, inf, big)) == [1.0, 0.0, 0.0, 1.0]
        assert norms(run(chain(guard(clip(1.0)), optax.adam(1.0)), big, nan))[1] > 0
        inside = optax.MultiSteps(guard(sgd), 2).gradient_transformation()
        outside = guard(optax.MultiSteps(sgd, 2).gradient_transformation())
        assert norms(run(inside, big, big, nan, *[big] * 7)) == [0, 28.46] + 8 * [0]
        assert norms(run(outside, big, big, nan, *[big] * 4)) == [0, 28.46, 0, 0, 28.46, 0, 28.46]
    signs, bare = chain(clip(1e-3), optax.sign_sgd(1.0)), optax.sign_sgd(1.0)
    assert norms(run(signs, big, grads(-1.0, 2.0))) == norms(run(bare, big, grads(-1.0, 2.0)))


def test_a_watch_behind_a_clip_sees_no_more_than_the_bound():
    seen = []
    for tx in (clipped(oc.watch()), chain(oc.watch(), clip(1.0))):
        state = tx.update(grads(9.0, 9.0), tx.init(PARAMS), PARAMS)[1]
        seen.append(round(float(oc.metrics(state)["watch/grad_norm"]), 3))
    assert seen == [1.0, 28.46]


@pytest.mark.parametrize("make", [optax.lion, optax.contrib.muon, optax.signum, optax.adam])
def test_a_clip_before_a_momentum_is_sound(make):
    """After a spike, a clip brings the updates back to those of the run without one."""

    def updates(tx, spike):
        key = jax.random.key(0)
        draws = 1.0 + jax.random.normal(key, (40, 4, 4))
        draws = draws.at[5].add(spike * jax.random.normal(jax.random.key(1), (4, 4)))
        return jnp.stack(
            [u["w"] for u in run(tx, *[{"w": g} for g in draws], params={"w": jnp.ones((4, 4))})]
        )[8:]

    def away(tx):
        a, b = updates(tx, 300.0), updates(make(0.1), 0.0)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    assert away(chain(clip(4.0), make(0.1))) < 0.75 * away(make(0.1))


def test_flax():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for tx, found in ((clipped(ADAM), []), (chain(ADAM, clip(1.0)), ["clip-after-normaliser"])):
        assert (
            names(nnx.Optimizer(model, tx, wrt=nnx.Param).tx, nnx.state(model, nnx.Param)) == found
        )
    frozen = chain(clip(1.0), optax.freeze({"kernel": False, "bias": True}))
    assert len(names(frozen, nnx.to_pure_dict(nnx.state(model, nnx.Param)))) == 1


def test_findings_print_one_per_line():
    found = oc.check(chain(optax.adam(1e-3), clip(1.0), clip(2.0)), PARAMS)
    assert len(found) > 1 and str(found) == "\n".join(map(str, found)) and found == tuple(found)
    assert str(oc.check(chain(clip(1.0), optax.adam(1e-3)), PARAMS)) == "nothing found"
