"""Whose call an error speaks of, and how it shows a value."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeGuard, TypeVar

from optaxclip.base import Part, annotate

_F = TypeVar("_F", bound=Callable[..., Any])
_P = ParamSpec("_P")
_R = TypeVar("_R")
# Where a part lies for the user, `thresholds.zscore`; clips lie at the top.
_NAMESPACES = ("actions", "aggregation", "feeds", "norms", "scopes", "thresholds")
_NOBODY = "optaxclip"
# Not a global: threads may build clips at the same time.
_CALL: contextvars.ContextVar[str] = contextvars.ContextVar("call", default=_NOBODY)


@contextlib.contextmanager
def speak_for(call: str) -> Generator[None, None, None]:
    """Makes errors inside speak of `call`. A context."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def named(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes errors inside a public function speak of it, or of the public one that called it."""
    room = (*(call.__module__ or "").split("."), "")[1]
    name = f"{room}.{call.__name__}" if room in _NAMESPACES else call.__name__

    @functools.wraps(call)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Who wrote `zclip(...)` has never heard of the `thresholds.zscore` inside.
        if _CALL.get() != _NOBODY:
            return call(*args, **kwargs)
        with speak_for(name):
            return call(*args, **kwargs)

    return wrapper


def called() -> str:
    """The public call that is running."""
    return _CALL.get()


def fail(must: str, got: Any, *, call: str | None = None) -> ValueError:
    """The error for an argument: "<call>: <argument> must be ..., got <value>."""
    return ValueError(f"{call or called()}: {must}, got {_show(got)}.")


def _show(value: Any) -> str:
    """A value in an error. Of a function that makes what is asked for, that it has to be called."""
    if is_maker(value):
        return show_maker(value)
    # The `repr` of a transformation is two addresses.
    update = getattr(value, "update", None)
    # A dict, too, has an `update`.
    if hasattr(value, "init") and hasattr(update, "__qualname__"):
        described = getattr(getattr(update, "description", None), "name", "")
        return f"a transformation of {described or update.__qualname__.split('.')[0]}"
    # `[1.0, 2.0]` looks like the array that was asked for.
    return f"the {type(value).__name__} {value!r}" if type(value) in (list, tuple) else repr(value)


def show_maker(maker: Any) -> str:
    """A function in an error, where what it makes was asked for: that it has to be called."""
    return f"the function {maker.__name__}: write {maker.__name__}(...), with parentheses"


def is_maker(value: Any) -> bool:
    """Whether a value is a function that has to be called first: it makes a part, clip, optimizer.

    So `clip_by(zclip)` is no clip with a schedule, which any function might be.
    """
    made = getattr(value, "__annotations__", {}).get("return", "")
    makes = getattr(value, "makes_part", False) or "GradientTransformation" in str(made)
    return callable(value) and makes


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a value is a function of somebody's: no part, and none that makes one."""
    return callable(value) and not is_maker(value) and not isinstance(value, Part)


def is_part(value: Any, room: str) -> bool:
    """Whether a value is a part of a namespace, such as `feeds.raw`."""
    return isinstance(value, Part) and value.name.startswith(f"{room}.")


def makes_part(maker: _F) -> _F:
    """Marks a function that makes a part, so that an error can say that it was not called."""
    # `action=actions.smooth` without parentheses is callable, as every action is: without the mark
    # it would be taken for one, and fail while an update is traced.
    return annotate(maker, makes_part=True)
