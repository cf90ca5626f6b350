"""The advice in an error works, and every error that gives advice is in the table."""

import ast
import functools
import importlib
import operator
import pathlib
import re

import jax
import optax
import pytest

import optaxclip as oc
from tests.advice import ADAM, ADVICE

pytestmark = pytest.mark.usefixtures("as_users")  # Optax's transformations promote dtypes


@functools.cache
def message_of(name):
    with pytest.raises((ValueError, TypeError), match=r".") as error:
        ADVICE[name].wrong()
    return str(error.value)


@pytest.mark.parametrize("name", ADVICE)
def test_advice_in_an_error_works(name):
    assert ADVICE[name].says in message_of(name)
    ADVICE[name].right()


# Messages that tell a reader to do something, or list alternatives for an argument.
ADVISES = re.compile(
    r"\b(write|pass|use|put|call|add|give|say|wrap|initialise|gather|leave|split|pad) "
    r"|such as |must be .*\bor "
    r"|must (sum|keep|return)",
    re.IGNORECASE,
)
# The advice in findings about a chain, a run or a plan is tested elsewhere.
ELSEWHERE = (
    *("checking", "monitoring/signs", "monitoring/words", "monitoring/explain"),
    *("tuning/runs", "tuning/training"),
)


def pieces_of(node):
    """The literal pieces of a string, in order."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [piece for value in getattr(node, "values", ()) for piece in pieces_of(value)]


def templates_in(tree):
    """The strings of a module, docstrings apart, each as its literal pieces."""
    said = [x for x in ast.walk(tree) if isinstance(x, ast.JoinedStr | ast.Constant)]
    inside = {id(part) for x in said if isinstance(x, ast.JoinedStr) for part in x.values}
    docs = {id(x.value) for x in ast.walk(tree) if isinstance(x, ast.Expr)}
    return [pieces_of(x) for x in said if id(x) not in inside | docs]


def advising():
    """Every message of the library that advises something, by its place."""
    house = pathlib.Path(oc.__file__).parent
    for file in sorted(house.rglob("*.py")):
        room = str(file.relative_to(house))
        for pieces in templates_in(ast.parse(file.read_text())):
            if ADVISES.search("".join(pieces)) and not room.startswith(ELSEWHERE):
                yield room, pieces


def test_every_error_with_advice_is_in_the_table():
    messages = [message_of(name) for name in ADVICE]
    missing = [
        (room, "...".join(pieces))
        for room, pieces in advising()
        if not any(re.search(".*?".join(map(re.escape, pieces)), m, re.DOTALL) for m in messages)
    ]
    assert not missing


def test_every_name_of_jax_and_optax_in_an_error_is_there():
    said = "\n".join(map(message_of, ADVICE))
    names = set(re.findall(r"(?<![\w./])(jax|optax|optaxclip)\.(\w+(?:\.\w+)*)", said))
    assert len(names) > 15
    for module, name in names:
        operator.attrgetter(name)(importlib.import_module(module))


PARTS = [oc.actions.zero, oc.feeds.raw, oc.scopes.leaf, oc.norms.l2, oc.actions, oc.scopes.groups]
PLACES = {
    "threshold": oc.clip_by,
    "scope": lambda part: oc.clip_by(1.0, scope=part),
    "norm": lambda part: oc.clip_by(1.0, norm=part),
    "action": lambda part: oc.clip_by(1.0, action=part),
    "exclude": lambda part: oc.clip_by(1.0, exclude=part),
    "feed": lambda part: oc.thresholds.running(feed=part),
    "label": oc.scopes.groups,
    "where": oc.scopes.stacked,
    "by_name": lambda part: oc.thresholds.by_name({"b": part}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_part_in_the_place_of_another_is_rejected(place):
    for part in PARTS:
        own = getattr(part, "name", "").startswith((f"{place}s.", f"{place}."))
        if own:
            PLACES[place](part)
        else:
            with pytest.raises(ValueError, match=r"must|none"):
                PLACES[place](part)


# Everything that takes a threshold, and transformations of gradients given instead of one.
TAKERS = {
    "clip_by": oc.clip_by,
    "at_most": lambda tx: oc.thresholds.at_most(1.0, tx),
    "lag": oc.thresholds.lag,
    "warmup": lambda tx: oc.thresholds.percentile(50.0, warmup=tx),
    "clip": oc.clip,
    "spectral_clip": oc.spectral_clip,
    "larc": oc.larc,
    "skip_spikes": lambda tx: oc.skip_spikes(ADAM, tx),
    "skip_spikes of losses": lambda tx: oc.skip_spikes(ADAM, loss_threshold=tx),
}
OF_GRADIENTS = [
    *(make(1.0) for make in (optax.clip, optax.clip_by_global_norm, optax.clip_by_block_rms)),
    *(make(0.1) for make in (optax.sgd, optax.adamw, optax.lion, optax.adafactor, optax.adagrad)),
    *(optax.sgd(lambda step: 0.1), optax.sgd(0.1, momentum=0.9), optax.contrib.muon(0.1)),
    *(optax.chain(optax.identity(), optax.adaptive_grad_clip(1.0)), oc.zclip(), oc.watch()),
    optax.chain(oc.zclip()),
    *(oc.skip_nonfinite(ADAM), optax.chain(oc.zclip(), ADAM), optax.scale_by_adam()),
]


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
def test_a_transformation_of_gradients_is_not_a_threshold(take):
    for tx in OF_GRADIENTS:
        with pytest.raises(ValueError, match="threshold"):
            take(tx)
    # Transformations of norms: a running mean, and one that the user wrote.
    mine = optax.stateless(lambda norms, params: jax.tree.map(lambda n: 0.9 * n, norms))
    for tx in (optax.chain(optax.ema(0.9), optax.scale(2.0)), optax.trace(0.9), mine):
        take(tx)
