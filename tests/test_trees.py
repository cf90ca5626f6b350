"""Laws of trees: every row of the table finds its leaves by position, gives them readable names,
and takes models as they are.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optaxclip as oc
from optaxclip.record import find_nodes
from optaxclip.trees import unpack_names
from tests.cases import ADAPTIVE, CASES, ROWS, program_lines

each_row = pytest.mark.parametrize("name", ROWS)


pytestmark = pytest.mark.usefixtures("as_users")  # Optax's transformations promote dtypes


# They group leaves by name.
BY_NAME = ("clip_by_group_norm", "band_clip")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in BY_NAME])
def test_leaves_that_share_a_path_are_told_apart(name):
    tx, leaves = ROWS[name](), [jnp.ones(shape) for shape in (2, (3, 4), 5, (4, 6))]

    def update(params):
        return jax.tree.leaves(tx.update(params, tx.init(params), params)[0])

    one, two, three, four = leaves
    twice = {"x": {"y": one}, "x/y": two, "z": {1: three}, "z/1": four}
    of_names, of_places = (jax.make_jaxpr(update)(tree).jaxpr for tree in (twice, leaves))
    assert list(program_lines(of_names)) == list(program_lines(of_places))


@each_row
def test_parameters_that_are_one_bare_array(name):
    state = jax.eval_shape(ROWS[name]().init, jnp.ones((3, 4)))
    seen = jax.eval_shape(oc.metrics, state) if jax.tree.leaves(state) else {}
    assert not any(key.endswith("/") for key in seen)


ATTENTION = {"att": {name: jnp.ones((2, 3)) for name in ("key", "query", "value")}}
NAMED = {case.name: case.make for case in ADAPTIVE}
NAMED |= {
    case.name: lambda make=case.make, scope=None, **more: make(1.0, **more)
    for case in CASES
    if case.name.startswith("clip_by_leaf") or case.name.startswith("clip_by_group")
}


@pytest.mark.parametrize("name", NAMED)
def test_a_leaf_called_value_keeps_its_name(name):
    make = NAMED[name]
    in_nnx = nnx.State(jax.tree.map(nnx.Param, ATTENTION))
    for params in (ATTENTION, in_nnx):
        (clip,) = find_nodes(
            jax.eval_shape(make(scope=oc.scopes.leaf).init, params), oc.base.ClipState
        )
        names = unpack_names(clip.metrics.blocks)
        assert names == ("att/key", "att/query", "att/value")
        tx = make(scope=oc.scopes.leaf, exclude="value$")
        (clip,) = find_nodes(jax.eval_shape(tx.init, params), oc.base.ClipState)
        assert unpack_names(clip.metrics.blocks) == names[:2]


@each_row
def test_optax_tree_get_and_set_still_find_their_fields(name):
    """`optax.tree.get` refuses a name that is there twice: no clip may have one of Optax's."""
    tx = optax.chain(ROWS[name](), optax.inject_hyperparams(optax.adam)(0.1))
    state = jax.eval_shape(tx.init, ATTENTION)
    assert optax.tree.get(state, "learning_rate").shape == ()
    new = optax.tree.set(state, learning_rate=0.5)
    assert optax.tree.get(new, "learning_rate") == 0.5
    # `stable_*` contain Adam themselves, so the state has its moments already.
    if not name.startswith("stable_"):
        assert optax.tree.get(state, "nu")["att"]["value"].shape == (2, 3)
        assert optax.tree.get(state, "mu")["att"]["value"].shape == (2, 3)


class Unfiltered(eqx.Module):
    """A typical Equinox model, in which functions and strings are leaves."""

    weight: jax.Array
    activation: Callable = jax.nn.relu
    name: str = "dense"
    size: int = 3


MODEL = Unfiltered(jnp.ones((3, 2)))
PARAMS = eqx.filter(MODEL, eqx.is_inexact_array)


@each_row
def test_check_takes_an_unfiltered_model(name):
    oc.check(ROWS[name](), MODEL)


def test_explain_takes_an_unfiltered_model():
    tx = optax.chain(oc.watch(), oc.skip_spikes(oc.clip_by_leaf_norm(1.0)))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert "step 1" in oc.explain(state, MODEL)
