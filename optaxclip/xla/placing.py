"""How arrays lie on devices by their types: what varies in `shard_map`, what Explicit axes cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from optaxclip.compat import manual_axes, to_varying, varying_axes


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, cast to the type that a collective over `axes` takes."""
    # If types are kept, a `psum` over two axes of an array that varies over one is an error.
    missing = sorted(set(axes) & set(manual_axes()) - varying_axes(x), key=str)
    return to_varying(x, missing) if missing and types_are_kept() else x


def types_are_kept() -> bool:
    """Whether `shard_map` tracks what varies: if it does, its axis index is of a varying type."""
    # There is no other way to ask: with `check_vma=False` all types are empty, as if replicated.
    return all(axis in varying_axes(lax.axis_index(axis)) for axis in manual_axes())


def vary_as(x: jax.Array, like: Any) -> jax.Array:
    """`x`, cast to vary over the devices among which `like` does."""
    return vary(x, varying_axes(like))


def fill_like(x: Any, value: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """An array of copies of `value`, (*the shape of x, *that of value), which lies as `x` does."""
    filled = jnp.full(x.shape + jnp.shape(value), value, dtype or x.dtype)
    spec = spec_of(x)
    return vary_as(jax.sharding.reshard(filled, spec) if any(spec) else filled, x)


def lie_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays of one shape, each cut by Explicit axes as the first one that is cut."""
    # JAX lets the sum of two lie as the one that is cut, but refuses to select between them.
    cut = [jax.typeof(x).sharding for x in arrays if any(spec_of(x))]
    return [jax.sharding.reshard(x, cut[0]) for x in arrays] if cut else list(arrays)


def is_shared(x: jax.Array, axes: Sequence[str]) -> bool:
    """Whether the type of `x` says that it is the same on all devices along one of `axes`."""
    # `vmap` and silent types say nothing.
    if not set(axes) <= set(manual_axes()) or not types_are_kept():
        return False
    return not set(axes) <= varying_axes(x)


def spec_of(x: Any) -> PartitionSpec:
    """How Explicit axes cut an array or shape, which its type says; Auto axes do not show."""
    return jax.typeof(x).sharding.spec


def here(x: Any) -> Any:
    """A number or array that a function closes over, as it may be used in `call_in_auto_axes`."""
    if not isinstance(x, jax.Array):
        return x
    kinds = jax.typeof(x).sharding.mesh.axis_types, jax.sharding.get_abstract_mesh().axis_types
    # Arrays of Auto axes have a mesh as well, but may be used anywhere.
    if AxisType.Explicit not in kinds[0] or AxisType.Auto not in kinds[1]:
        return x
    # What comes out of such a call is cast to the axes around it.
    cast: Any = jax.sharding.explicit_axes(lambda: x, in_sharding=())
    return cast()


def like(value: Any, x: jax.Array) -> jax.Array:
    """A number, array or tracer that a function closes over, in the dtype of `x`."""
    return jnp.asarray(here(value)).astype(x.dtype)


def call_in_auto_axes(
    function: Callable[..., tuple[list[jax.Array], Any]],
    arrays: list[jax.Array],
    state: Any,
    rest: Any = None,
) -> tuple[list[jax.Array], Any]:
    """`function(arrays, state, rest)`, with Explicit mesh axes treated as Auto inside.

    With Explicit axes each product, select and vmap would have to be told the sharding of its
    result. The arrays and the state come out sharded as they went in.
    """
    leaves, structure = jax.tree.flatten((state, rest))
    # Types change inside, so arrays may not be closed over; strings and the like may.
    numbers = {i: x for i, x in enumerate(leaves) if hasattr(x, "dtype")}
    known = [x for x in (*arrays, *numbers.values()) if isinstance(x, jax.Array)]
    placed = [x for x in known if jax.typeof(x).sharding.mesh.explicit_axes]
    if not placed:
        return function(arrays, state, rest)
    numbers = {i: _join(x, placed[0]) for i, x in numbers.items()}

    def inside(arrays, numbers):
        whole = [numbers.get(i, x) for i, x in enumerate(leaves)]
        return function(arrays, *structure.unflatten(whole))

    mesh, results = jax.typeof(placed[0]).sharding.mesh, jax.tree.map(spec_of, (arrays, state))
    # The mesh in the types, as the context of `jax.set_mesh` may have ended.
    with jax.sharding.use_abstract_mesh(mesh):
        # Not all axes: those of a `shard_map` around this stay as they are.
        axes = mesh.explicit_axes
        run: Any = jax.sharding.auto_axes(inside, axes=axes, out_sharding=results)
        return run(arrays, numbers)


def _join(x: Any, other: Any) -> Any:
    """`x` on the devices of `other`, if it lies on no mesh and this is no trace."""
    # A counter that is alone in an operation would not know its devices.
    if isinstance(other, jax.core.Tracer) or not jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.device_put(x, NamedSharding(other.sharding.mesh, PartitionSpec()))
