"""Checks of arguments: each takes an argument by its name, and says what it must be."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.validate.calls import called, fail, is_function, is_part


def to_concrete(value: Any) -> Any:
    """A concrete array or NumPy scalar as a Python or NumPy value; anything else unchanged.

    It waits for the device, so call it when a clip is built, not at every step.
    """
    # One process cannot fetch an array that is spread over several processes.
    traced = isinstance(value, jax.core.Tracer)
    if isinstance(value, jax.Array) and not traced and value.is_fully_addressable:
        value = np.asarray(jax.device_get(value))
    scalar = isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0
    return value.item() if scalar else value


def is_static(value: Any) -> TypeGuard[float]:
    """Whether a value is a Python number, not an array that `inject_hyperparams` may change."""
    return isinstance(value, int | float)


def _is_real(value: Any) -> bool:
    # A bool is a number to Python: `clip_by(True)` would clip to 1.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _scalar(inside: Callable[[float], bool], words: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        seen = to_concrete(value)
        traced = isinstance(seen, jax.Array) and seen.ndim == 0
        # Tests what is allowed, not what is forbidden: NaN compares false and must fail.
        if not traced and not (_is_real(seen) and inside(seen)):
            raise fail(f"{name} must be a number {words}", value)


def nonnegative(**arguments: Any) -> None:
    """Checks that each is a number from 0 to inf."""
    _scalar(lambda x: x >= 0, "from 0 to inf", arguments)


def positive(**arguments: Any) -> None:
    """Checks that each is a number larger than 0."""
    _scalar(lambda x: x > 0, "larger than 0", arguments)


def share(**arguments: Any) -> None:
    """Checks that each is a number from 0 to below 1, such as a decay."""
    _scalar(lambda x: 0 <= x < 1, "from 0 to below 1", arguments)


def between(low: float, high: float, /, **arguments: Any) -> None:
    """Checks that each is a number from `low` to `high`, both included."""
    _scalar(lambda x: low <= x <= high, f"from {low:g} to {high:g}", arguments)


def at_least(low: float, /, **arguments: Any) -> None:
    """Checks that each is a number of at least `low`."""
    _scalar(lambda x: x >= low, f"of at least {low:g}", arguments)


def above(low: float, /, **arguments: Any) -> None:
    """Checks that each is a number larger than `low`."""
    _scalar(lambda x: x > low, f"larger than {low:g}", arguments)


def steps(low: int = 0, /, **arguments: Any) -> None:
    """Checks that each counts steps: a whole number of at least `low`, an array or a tracer."""
    for name, value in arguments.items():
        seen = to_concrete(value)
        traced = isinstance(seen, jax.Array) and seen.ndim == 0
        # Infinity means "never", and `int` does not accept it.
        whole = _is_real(seen) and seen >= low and (seen == math.inf or seen == int(seen))
        if not traced and not whole:
            raise fail(f"{name} must be a whole number of steps, at least {low}", value)


def size(**arguments: Any) -> None:
    """Checks that each is a Python int of at least 1, because it sets the size of the state."""
    for name, value in arguments.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{called()}: {name} sets the size of the state and must be a Python int, not an"
                f" array. With optax.inject_hyperparams write inject_hyperparams({called()},"
                f" static_args=({name!r},))."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise fail(f"{name} must be a whole number of at least 1", value)


def choice(choices: Sequence[str], **arguments: Any) -> None:
    """Checks that each is one of these strings."""
    for name, value in arguments.items():
        # The type comes first: comparing an array with a string does not return a bool.
        if not isinstance(value, str) or value not in choices:
            raise fail(f"{name} must be one of {', '.join(map(repr, choices))}", value)


def flag(**arguments: Any) -> None:
    """Checks that each is True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise fail(f"{name} must be True or False", value)


def feed(**arguments: Any) -> None:
    """Checks that each is a function `(norms, bounds) -> norms`."""
    for name, value in arguments.items():
        if not (is_function(value) or is_part(value, "feeds")):
            choices = "feeds.raw, feeds.clipped, feeds.accepted"
            raise fail(f"{name} must be {choices} or a function (norms, bounds) -> norms", value)


_BOUND = "a number from 0 to inf, an array of such numbers"
_SCHEDULE = "a schedule (a function of the step)"
_THRESHOLD = f"{_BOUND}, {_SCHEDULE} or a threshold (an optax transformation of norms)"


def bound(*, wait: bool = True, **arguments: Any) -> None:
    """Checks that each can be a bound: a real number from 0 to inf, an array of these, or a tracer.

    Without `wait`, which is for calls at every step, numbers on a device are not checked.
    """
    _bounds(_BOUND, wait, arguments)


def threshold(**arguments: Any) -> None:
    """Checks that each can be a bound, for arguments that may also be a schedule or a threshold."""
    _bounds(_THRESHOLD, True, arguments)


def _bounds(words: str, wait: bool, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        seen = to_concrete(value) if wait or not isinstance(value, jax.Array) else value
        # `jnp.issubdtype`, because NumPy's does not know that bfloat16 is a float.
        if isinstance(seen, jax.Array | np.ndarray):
            kinds = jnp.floating, jnp.integer
            fine = any(jnp.issubdtype(seen.dtype, kind) for kind in kinds)
            fine = fine and (isinstance(seen, jax.Array) or bool(np.all(seen >= 0)))
        else:
            fine = _is_real(seen) and float(seen) >= 0
        if not fine:
            raise fail(f"{name} must be {words}", value)


def exclude(value: Any) -> None:
    """Checks that `exclude` can say which leaves to leave alone."""
    if not (value is None or isinstance(value, str) or is_function(value)):
        choices = "a regular expression (str), a predicate of the path, or None"
        raise fail(f"exclude must be {choices}", value)
    if isinstance(value, str):
        pattern(exclude=value)


def pattern(**arguments: str) -> None:
    """Checks that each is a regular expression."""
    for name, value in arguments.items():
        try:
            re.compile(value)
        except re.error as error:
            must = f"{name} must be a regular expression, such as 'bias$' ({error})"
            raise fail(must, value) from None


def is_transformation(value: Any) -> bool:
    """Whether a value has the two functions of an optax transformation."""
    # Judged by what it can do: Optax accepts any such pair, not only those of its own type.
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def as_optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer inside a wrapper accept extra arguments.

    Raises:
      ValueError: naming the call, if `inner` is not an optimizer.
    """
    if not is_transformation(inner):
        raise fail("inner must be an optimizer, such as optax.adam(1e-3)", inner)
    return optax.with_extra_args_support(inner)
