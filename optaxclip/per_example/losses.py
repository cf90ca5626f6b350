"""Checks the arguments and results of a loss of one example before they fail inside JAX."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import validate, xla
from optaxclip.compat import varying_axes
from optaxclip.trees import flatten_with_paths, is_measured

Loss = Callable[..., tuple[jax.Array, Any]]

_NO_BATCH_NORM = (
    "Batch statistics, as in BatchNorm, cannot be computed here: the loss sees one example at a"
    " time, and through such statistics each example would change the gradients of all others, so"
    " no clip could bound the effect of one example. Use GroupNorm or LayerNorm instead, or"
    " BatchNorm with fixed statistics, passed after batch."
)


def as_pair(loss: Callable[..., Any], has_aux: bool, keep_batch_dim: bool) -> Loss:
    """Wraps the loss of one example as a function that returns (loss, aux), checked."""
    call = validate.called()

    def pair(params, example, *shared) -> tuple[Any, Any]:
        if keep_batch_dim:
            example = jax.tree.map(lambda x: x[None], example)
        try:
            out = loss(params, example, *shared)
        except Exception as error:
            # BatchNorm takes a mean over `axis_name="batch"`, which is not bound here, or writes
            # to a state that cannot be returned. Only the text of a framework's error reveals it.
            if re.search("unbound axis name|BatchStat|batch_stats", str(error)) is None:
                raise
            cause = str(error).partition("\n")[0]
            raise ValueError(f"{call}: the loss failed: {cause} {_NO_BATCH_NORM}") from error
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            kind = type(out).__name__
            raise validate.fail(
                "loss must return a pair (loss, aux) with has_aux=True", kind, call=call
            )
        value, aux = out if has_aux else (out, None)
        _check_loss(value, call)
        _check_aux(aux, call)
        return value, aux

    return pair


def _check_loss(value: Any, call: str) -> None:
    if isinstance(value, tuple | list):
        raise ValueError(
            f"{call}: loss returned a {type(value).__name__}; for a pair (loss, aux) pass"
            " has_aux=True."
        )
    if not jax.tree_util.all_leaves([value]):
        raise ValueError(
            f"{call}: loss returned a {type(value).__name__}: an example has one gradient, so add"
            " the losses up, and return them separately as aux, with has_aux=True."
        )
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{call}: loss must be one real number for one example, got {jnp.result_type(value)} of"
            f" shape {jnp.shape(value)}. It sees an example without the batch axis (with"
            " keep_batch_dim=True, with a batch axis of 1), and must sum or average the rest."
        )


def _check_aux(aux: Any, call: str) -> None:
    strange = [type(x).__name__ for x in jax.tree.leaves(aux) if not _is_array(x)]
    if strange:
        raise ValueError(
            f"{call}: aux must hold arrays of numbers, and the loss returned {strange}."
        )
    # Linen returns statistics as plain arrays; only the keys of the tree identify them.
    paths = [path for path, _ in flatten_with_paths(aux)[0]]
    if _has_statistics(aux) or any(re.search("batch_stats|BatchNorm", path) for path in paths):
        raise ValueError(f"{call}: the loss returned batch statistics. {_NO_BATCH_NORM}")


def _has_statistics(tree: Any) -> bool:
    """Checks whether a tree has batch statistics of Flax's nnx, which have their own type."""

    def is_statistic(x):
        # By name, because Flax is not a dependency.
        return type(x).__name__ == "BatchStat"

    return any(map(is_statistic, jax.tree.leaves(tree, is_leaf=is_statistic)))


def check_arrays(**arguments: Any) -> None:
    """Raises ValueError, naming the call, for leaves that are not arrays, as `vmap` needs them."""
    for name, tree in arguments.items():
        for path, x in flatten_with_paths(tree)[0]:
            if not _is_array(x):
                kind = getattr(x, "dtype", type(x).__name__)
                raise ValueError(
                    f"{validate.called()}: {name} must hold arrays of numbers, but the leaf"
                    f" {path!r} is of type {kind}. Bind anything that is not an array to the loss:"
                    " functools.partial(loss, mode='train')."
                )


def _is_array(x: Any) -> bool:
    """Whether JAX takes it for an array, of numbers or of random keys."""
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def count_examples(batch: Any) -> int:
    """Returns the size of the leading axis that all leaves of a batch share."""
    shapes = {path: jnp.shape(x) for path, x in flatten_with_paths(batch)[0]}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"{validate.called()}: every leaf of batch needs a leading axis that numbers the same"
            f" examples; got shapes {shapes}. Pass whatever all examples share after batch:"
            " value_and_grad(params, batch, shared)."
        )
    ((size,),) = sizes
    if size == 0:
        raise ValueError(
            f"{validate.called()}: batch must hold at least one example; got shapes {shapes}. For a"
            " batch that may be empty, such as a Poisson sample, pad it to a fixed size and pass"
            " weights=, 0 for the padding."
        )
    return size


def as_weights(weights: Any, size: int) -> jax.Array:
    """Converts weights or a mask to floats: ones for None, 0 for negative numbers and NaN."""
    if weights is None:
        return jnp.ones(size)
    # NumPy also accepts lists, and leaves the device alone until shape and dtype are checked.
    weights = weights if isinstance(weights, jax.Array) else np.asarray(weights)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if weights.shape != (size,) or not any(jnp.issubdtype(weights.dtype, k) for k in kinds):
        raise ValueError(
            f"{validate.called()}: weights must be {size} real numbers or booleans, one per"
            f" example; got {weights.dtype} of shape {weights.shape}."
        )
    dtype = xla.accumulator([weights]) if is_measured(weights) else jnp.float32
    weights = jnp.asarray(weights).astype(dtype)
    # A comparison, which is false for NaN; `maximum` would propagate NaN.
    return jnp.where(weights > 0, weights, 0)


def as_leaves(params: Any) -> list[jax.Array]:
    """Returns the parameters as a list of arrays, checked."""
    if _has_statistics(params):
        raise ValueError(f"{validate.called()}: params hold batch statistics. {_NO_BATCH_NORM}")
    flat, _ = flatten_with_paths(params)
    others = [path for path, x in flat if not is_measured(x)]
    if others:
        raise ValueError(
            f"{validate.called()}: params must hold floating-point numbers, but these leaves do"
            f" not: {', '.join(others)}. Split off what is not trained, and pass it after batch:"
            " value_and_grad(params, batch, shared)."
        )
    return [jnp.asarray(x) for _, x in flat]


def vary_like(params: Any, examples: Any) -> Any:
    """Types the parameters, inside `shard_map`, as varying over the axes of the examples.

    JAX sums derivatives with respect to replicated values over all devices: the gradient of one
    example would be a sum of one example per device, and would be clipped as such.
    """
    axes = sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(examples))))
    return jax.tree.map(lambda x: xla.vary(x, axes), params) if axes else params
