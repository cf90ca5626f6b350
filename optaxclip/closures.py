"""Reading the closures of Optax's transformations.

An optax transformation is a pair of closures, and its state is often an `EmptyState`; but a closure
tells which function made it (`clip_by_global_norm.<locals>.update_fn`), and with which arguments.
Our own transformations are not read this way: they carry an `optaxclip.engine.Description`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any


def unwrap(fn: Any) -> Any:
    """The Python function inside a compiled one."""
    while hasattr(fn, "__wrapped__") and not isinstance(fn, types.FunctionType):
        fn = fn.__wrapped__
    return fn


def read_closure(fn: Callable) -> dict[str, Any]:
    """The variables of a closure, or the attributes of the object whose method a function is."""
    fn = unwrap(fn)
    # A partial has no code of its own; what it binds counts as an argument.
    if isinstance(fn, functools.partial):
        return read_closure(fn.func) | fn.keywords
    if inspect.ismethod(fn):
        return dict(getattr(fn.__self__, "__dict__", {}))
    names = getattr(getattr(fn, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(fn, "__closure__", None) or (), strict=True):
        # A cell is empty where a variable is set in a branch that was not taken.
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def find_module(fn: Callable) -> str:
    """The module that defines a function."""
    # Not `__module__`, which `functools.wraps` copies from what is wrapped.
    return getattr(unwrap(fn), "__globals__", {}).get("__name__", "")


def find_maker(fn: Callable) -> str:
    """The name of the function that made a function, with its module if that is not optax or ours.

    Read off the code, not off `__qualname__`, which `functools.wraps` copies from what is wrapped.
    """
    fn = unwrap(fn)
    if isinstance(fn, functools.partial):
        return find_maker(fn.func)
    code = getattr(fn, "__code__", None)
    name = code.co_qualname.split(".")[0] if code else type(fn).__name__
    module = find_module(fn)
    return name if module.split(".")[0] in ("optax", "optaxclip") else f"{module}.{name}"
