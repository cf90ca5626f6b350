"""Functions of many examples whose convolutions keep the examples apart.

The gradient of a kernel is a convolution of two arrays of an example; for many examples JAX makes
one by groups of them. XLA may compute it with zeros in place of the other groups. That is slow, and
as 0 · NaN is NaN, one example would spoil all others.

If the kernel has groups of features, it is a convolution by groups of a batch. XLA for CPUs fills
one more axis with zeros then, which takes up to a thousand times as long as the same sums by groups
of features, and for these it puts no zeros anywhere. XLA for TPUs does: see `xla.keep_apart`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend import core

from optaxclip.compat import bind
from optaxclip.per_example.walk import get_aval
from optaxclip.trees import is_measured
from optaxclip.xla import keep_apart


def map_examples(each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a function of a batch from one of an example, like `vmap`."""

    def run(example):
        # Traced inside `vmap`: only there does an example have the type that operations will see.
        closed, shapes = jax.make_jaxpr(each, return_shape=True)(example)
        results = core.jaxpr_as_fun(_rewrite(closed))(*jax.tree.leaves(example))
        return jax.tree.structure(shapes).unflatten(results)

    return jax.vmap(run)


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
    # Integers hold no NaN.
    if eqn.primitive.name == "conv_general_dilated" and is_measured(get_aval(eqn.outvars[0])):
        # As a jitted function it is again one operation, in the place of the other.
        convolve = jax.jit(_map_apart(functools.partial(_convolve, eqn)))
        # In the settings of the other: 64-bit types, for example, may be enabled only there.
        with eqn.ctx.manager:
            (call,) = jax.make_jaxpr(convolve)(*map(get_aval, eqn.invars)).jaxpr.eqns
        return call.replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)
    params = {name: _rewrite(x) for name, x in eqn.params.items()}
    return eqn if params == eqn.params else eqn.replace(params=params)


def _map_apart(convolve: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the same convolution, which `vmap` maps in another way."""
    mapped_apart = custom_vmap(convolve)

    @mapped_apart.def_vmap
    def _(size, mapped, *operands):
        many = jax.vmap(convolve, [0 if own else None for own in mapped])
        # Only if both are of an example JAX makes groups of them.
        return keep_apart(many, *operands) if all(mapped) else many(*operands), True

    # Where nothing is mapped, JAX cannot differentiate a `custom_vmap`.
    smooth = jax.custom_jvp(mapped_apart)

    @smooth.defjvp
    def _(operands, tangents):
        return smooth(*operands), jax.jvp(convolve, operands, tangents)[1]

    return smooth


def _convolve(eqn: core.JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Computes a convolution, one by groups of the batch by groups of features."""
    groups = eqn.params["batch_group_count"]
    if groups == 1:
        return bind(eqn, [lhs, rhs])
    # Group i of the batch meets group i of the kernels in both forms.
    batch, feature, *_ = eqn.params["dimension_numbers"].lhs_spec
    shape = list(lhs.shape)
    shape[batch : batch + 1] = groups, shape[batch] // groups
    lhs = jnp.moveaxis(lhs.reshape(shape), batch, feature)
    params = eqn.params | {"batch_group_count": 1, "feature_group_count": groups}
    return bind(eqn.replace(params=params), [lax.collapse(lhs, feature, feature + 2), rhs])
