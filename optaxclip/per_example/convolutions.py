"""Convolutions by groups, for many examples at once.

The gradient of a kernel by groups of features is a convolution by groups of its batch. For many
examples JAX makes of it one with as many times the groups, which XLA for CPUs computes along one
more axis, filled up with zeros. That takes up to a thousand times as long as the same sums by
groups of features, and zeros times the NaN of one example are NaN for all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from optaxclip.compat import bind
from optaxclip.per_example.walk import get_aval


def by_features(each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the same function of a batch, without convolutions by groups of a batch."""

    def run(batch):
        closed, shapes = jax.make_jaxpr(each, return_shape=True)(batch)
        results = core.jaxpr_as_fun(_rewrite(closed))(*jax.tree.leaves(batch))
        return jax.tree.structure(shapes).unflatten(results)

    return run


def _rewrite(x: Any) -> Any:
    """Rewrites a jaxpr, or a parameter of an operation; returns what has nothing to change."""
    # In this order, because JAX 0.12 has only one type, which is its own `jaxpr`.
    if isinstance(x, core.Jaxpr):
        eqns = list(map(_rewrite_op, x.eqns))
        # The same object if nothing changed: JAX lowers one that is called often only once.
        return x if eqns == x.eqns else x.replace(eqns=eqns)
    if isinstance(x, core.ClosedJaxpr):
        inner = _rewrite(x.jaxpr)
        return x if inner is x.jaxpr else x.replace(jaxpr=inner)
    return tuple(map(_rewrite, x)) if type(x) is tuple else x


def _rewrite_op(eqn: core.JaxprEqn) -> core.JaxprEqn:
    if eqn.params.get("batch_group_count", 1) > 1:
        # As a jitted function it is again one operation, in the place of the other.
        convolve = jax.jit(functools.partial(_convolve, eqn))
        with eqn.ctx.manager:
            (call,) = jax.make_jaxpr(convolve)(*map(get_aval, eqn.invars)).jaxpr.eqns
        return call.replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)
    params = {name: _rewrite(x) for name, x in eqn.params.items()}
    return eqn if params == eqn.params else eqn.replace(params=params)


def _convolve(eqn: core.JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Computes a convolution by groups of the batch by groups of features."""
    groups = eqn.params["batch_group_count"]
    batch, feature, *_ = eqn.params["dimension_numbers"].lhs_spec
    shape = list(lhs.shape)
    shape[batch : batch + 1] = groups, shape[batch] // groups
    lhs = jnp.moveaxis(lhs.reshape(shape), batch, feature)
    params = eqn.params | {"batch_group_count": 1, "feature_group_count": groups}
    return bind(eqn.replace(params=params), [lax.collapse(lhs, feature, feature + 2), rhs])
