"""Which call an error names, and how it shows a value."""

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
# Users find parts in namespaces, such as `thresholds.zscore`, and clips at the top.
_NAMESPACES = ("actions", "aggregation", "feeds", "norms", "scopes", "thresholds")
_NOBODY = "optaxclip"
# Not a global: threads may build clips at the same time.
_CALL: contextvars.ContextVar[str] = contextvars.ContextVar("call", default=_NOBODY)


@contextlib.contextmanager
def speak_for(call: str) -> Generator[None, None, None]:
    """A context in which errors name `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def named(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes errors inside a public function name it, or the public function that called it."""
    room = (*(call.__module__ or "").split("."), "")[1]
    name = f"{room}.{call.__name__}" if room in _NAMESPACES else call.__name__

    @functools.wraps(call)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # A user who wrote `zclip(...)` does not know about the `thresholds.zscore` inside.
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
    """Shows a value in an error, and says so if it is a function that must be called first."""
    if is_maker(value):
        return show_maker(value)
    # The `repr` of a transformation shows only two addresses.
    update = getattr(value, "update", None)
    # A dict has an `update`, too.
    if hasattr(value, "init") and hasattr(update, "__qualname__"):
        described = getattr(getattr(update, "description", None), "name", "")
        return f"a transformation of {described or update.__qualname__.split('.')[0]}"
    # Without its type, `[1.0, 2.0]` looks like the array that is needed.
    return f"the {type(value).__name__} {value!r}" if type(value) in (list, tuple) else repr(value)


def show_maker(maker: Any) -> str:
    """Shows a function that was passed instead of what it makes, and says to call it."""
    return f"the function {maker.__name__}: write {maker.__name__}(...), with parentheses"


def is_maker(value: Any) -> bool:
    """Whether a value is a function to call first, because it makes a part, clip or optimizer.

    Otherwise `clip_by(zclip)` would take `zclip` for a schedule, which can be any function.
    """
    made = getattr(value, "__annotations__", {}).get("return", "")
    makes = getattr(value, "makes_part", False) or "GradientTransformation" in str(made)
    return callable(value) and makes


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether a value is a plain function: not a part, and not one that makes a part."""
    return callable(value) and not is_maker(value) and not isinstance(value, Part)


def is_part(value: Any, *rooms: str) -> bool:
    """Whether a value is a part of one of these namespaces, such as `feeds.raw` of "feeds"."""
    return isinstance(value, Part) and value.name.split(".")[0] in rooms


def makes_part(maker: _F) -> _F:
    """Marks a function that makes a part, so that an error can say that it was not called."""
    # `action=actions.smooth` without parentheses is callable, like every action. Without the mark
    # it would be taken for an action, and fail while an update is traced.
    return annotate(maker, makes_part=True)
