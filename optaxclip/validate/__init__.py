"""Errors for bad arguments: each names the call, the argument, what it must be and what it is.

    @named                              # errors inside name the outermost such call
    def zclip(z=2.5, decay=0.97):
        validate.nonnegative(z=z)       # zclip: z must be a number from 0 to inf, got -1.

No public call is running during an update. There `speak_for` gives errors the name of the call that
built the clip.

An array on a device is checked like a number; a tracer passes, because its value is not known.
"""

from optaxclip.validate.arguments import (
    above,
    as_optimizer,
    at_least,
    between,
    bound,
    choice,
    exclude,
    feed,
    flag,
    is_static,
    is_transformation,
    nonnegative,
    pattern,
    positive,
    share,
    size,
    steps,
    threshold,
    to_concrete,
)
from optaxclip.validate.calls import (
    called,
    fail,
    is_function,
    is_maker,
    is_part,
    makes_part,
    named,
    show_maker,
    speak_for,
)

__all__ = [
    "above",
    "as_optimizer",
    "at_least",
    "between",
    "bound",
    "called",
    "choice",
    "exclude",
    "fail",
    "feed",
    "flag",
    "is_function",
    "is_maker",
    "is_part",
    "is_static",
    "is_transformation",
    "makes_part",
    "named",
    "nonnegative",
    "pattern",
    "positive",
    "share",
    "show_maker",
    "size",
    "speak_for",
    "steps",
    "threshold",
    "to_concrete",
]
