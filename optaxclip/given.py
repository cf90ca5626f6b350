"""What the user gave: what can be known of it when a clip is built, and how an error says it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax


def known(value: Any) -> Any:
    """A jax array whose numbers are there to be read, as one of NumPy's; a tracer, and anything else, as it is.

    It waits for the device: for what builds a clip, not for what runs at every step.
    """
    traced = not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer)
    return value if traced or not value.is_fully_addressable else np.asarray(jax.device_get(value))


def said(value: Any, *makers: Callable) -> str:
    """The value in an error; of a function that makes what is asked for, that it has to be called."""
    for maker in makers:
        if value is maker:
            return f"the function {maker.__name__}: write {maker.__name__}(), with parentheses"
    return repr(value)


def as_optimizer(inner: Any, call: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer inside a wrapper, taking extra arguments.

    Raises:
      ValueError: naming the call, if it is none.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(f"{call}: inner must be an optimizer, such as optax.adam(1e-3), got {inner!r}.")
    return optax.with_extra_args_support(inner)
