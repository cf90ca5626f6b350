"""What JAX 0.7 to 0.9 have in other forms than later versions: nothing else here depends on one.

JAX is asked for what it has, not for its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core


def varying_axes(x) -> frozenset[str]:
    """The mesh axes over which an array varies, read from its type."""
    # Before JAX 0.10 it is `vma`.
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(jax.typeof(x), "vma", ()) if kind is None else kind.varying)


def to_varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`x`, the same on all devices along `axes`, cast to the type of what varies along them."""
    # JAX 0.7 has only `pvary`, and from JAX 0.9 on that warns that it is deprecated.
    if hasattr(lax, "pcast"):
        return lax.pcast(x, tuple(axes), to="varying")
    older: Any = lax
    return older.pvary(x, tuple(axes))


def write_to_varying(name: str, axes: Sequence[str]) -> str:
    """How a user writes `to_varying` of an array of this name, for the advice in errors."""
    if hasattr(lax, "pcast"):
        return f"jax.lax.pcast({name}, {tuple(axes)!r}, to='varying')"
    return f"jax.lax.pvary({name}, {tuple(axes)!r})"


def manual_axes() -> tuple[Any, ...]:
    """The mesh axes along which each device runs the code on its own part of the arrays."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    # In JAX 0.7 `pmap` has no mesh, nor in 0.8 and 0.9 where this option is off: without its axis a
    # clip would take the norm of one device, and say nothing.
    if axes or getattr(jax.config, "jax_pmap_shmap_merge", True):
        return axes
    return tuple(filter(_is_of_devices, jax.core.unsafe_get_axis_names_DO_NOT_USE()))


def _is_of_devices(axis: Any) -> bool:
    """Whether an axis is one of `pmap`, and not of `vmap`."""
    # Only `vmap` gives its own index as a batch. A `vmap` around a `jit` cannot be recognized: a
    # clip inside it must be told `axis_names=()`.
    return type(lax.axis_index(axis)).__name__ != "BatchTracer"


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> Any:
    """The result of an equation of a jaxpr for `values`; a list where its primitive has several."""
    parameters = eqn.primitive.get_bind_params(eqn.params)
    # Before JAX 0.9 functions come beside the parameters, to be passed before the values.
    functions, parameters = ((), parameters) if isinstance(parameters, dict) else parameters
    return eqn.primitive.bind(*functions, *values, **parameters)
