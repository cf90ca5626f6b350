"""A threshold from what a user passes as one, and what is none because it takes gradients."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import validate
from optaxclip.base import Threshold
from optaxclip.closures import find_maker, find_module, read_closure
from optaxclip.thresholds.fixed import scheduled, unchecked


def as_threshold(**argument: Threshold) -> optax.GradientTransformationExtraArgs:
    """A threshold from a number, an array, a tracer, a schedule, or a transformation.

    Raises:
      ValueError: naming the call and the argument, if it is none of these.
    """
    ((name, value),) = argument.items()
    must = f"{name} must be a number, a schedule or a threshold"
    # A clip is a transformation, too, and would treat norms as gradients without an error.
    if isinstance(value, type):
        raise validate.fail(must, value)
    if hasattr(getattr(value, "update", None), "description"):
        own = "this is a clip already: use it as it is, or pass one of optaxclip.thresholds"
        raise validate.fail(f"{must}; {own}", value)
    if isinstance(value, optax.GradientTransformation):
        if is_of_gradients(value):
            beside = (
                "this one takes gradients: put it beside the clip, optax.chain(clip, optimizer)"
            )
            raise validate.fail(f"{must} of norms; {beside}", value)
        return optax.with_extra_args_support(value)
    if validate.is_function(value):
        return scheduled(value)
    validate.threshold(**argument)
    return unchecked(value)


def is_of_gradients(tx: optax.GradientTransformation) -> bool:
    """Whether this transforms gradients, as a clip or an optimizer does, and not norms."""
    if hasattr(tx.update, "learns"):  # a threshold of ours
        return False
    return any(map(_acts_on_gradients, _functions_in(tx.update))) or _has_moments(tx)


def _acts_on_gradients(function: Callable[..., Any]) -> bool:
    """Whether this function belongs to a clip or an optimizer."""
    if not _is_of_optax(function):
        return hasattr(function, "description")  # ours
    maker = find_maker(function)
    if maker == "scale":
        # A bound is never negative; the factor of a learning rate is.
        step = read_closure(function).get("step_size")
        return validate.is_static(step) and step < 0
    return maker.startswith(("clip", "adaptive_grad_clip", "scale_by_learning_rate"))


def _functions_in(function: Any) -> Iterator[Callable[..., Any]]:
    """A function and, if it is Optax's, the functions it closes over: the parts of a chain."""
    if isinstance(function, types.FunctionType):
        yield function
    # Do not look into closures of the user's, which may hold anything.
    if _is_of_optax(function):
        for inside in jax.tree.leaves(read_closure(function)):
            yield from _functions_in(inside)


def _is_of_optax(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and find_module(function).startswith("optax.")


def _has_moments(tx: optax.GradientTransformation) -> bool:
    """Whether its state is that of an optimizer."""
    try:
        # Shapes only: constructing a clip must not start a backend.
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((), jnp.float32))
    except Exception:  # a threshold may take no scalar norms
        return False
    # Not by `count` or `trace`: `optax.ema` and `optax.trace` are useful as thresholds.
    return any(optax.tree.get_all_with_path(state, name) for name in ("mu", "nu"))
