"""The signs of gradients that explode or vanish, in a recorded window: each with its evidence, and what to try."""

from typing import Any, NamedTuple

from optaxclip.findings import Findings
from optaxclip.watching.signs import RULES
from optaxclip.watching.window import as_window


class Sign(NamedTuple):
    """One sign that something is wrong.

    Attributes:
      name: a short name, which stays: "norms-exploding".
      what: what is seen, in words.
      evidence: the numbers.
      mend: what to try.
    """

    name: str
    what: str
    evidence: dict[str, float]
    mend: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}\n    Try: {self.mend}"


def diagnose(history: Any, *, losses: Any = None, param_norms: Any = None) -> tuple[Sign, ...]:
    """Looks for the signs of exploding and vanishing gradients in a recorded window of steps.

    The signs are listed, with the numbers that make them, in docs/watching.md. A window of 100 steps or more says most;
    one of fewer than 20 only whether all was finite. A healthy run has no signs.

    Args:
      history: what `optaxclip.metrics` read at each step: a `History`, a sequence of dicts, or a dict of arrays with
        one entry a step, as `lax.scan` stacks them.
      losses: the loss at each step; None: what the history has under "loss", if anything.
      param_norms: the norm of all parameters at each step; None: what the history has under "param_norm", if anything.

    Returns:
      A tuple of `Sign`, empty if there are none; `str` of one reads well.

    Raises:
      ValueError: if the history has no norms.

    >>> import numpy as np, optaxclip
    >>> for sign in optaxclip.diagnose({"clip/grad_norm": 1.2 ** np.arange(40)}):
    ...     print(sign.name, sorted(sign.evidence))
    norms-exploding ['doubling_steps', 'growth', 'r2', 'steps']
    """
    window = as_window(history, losses, param_norms)
    return Findings(Sign(*found) for rule in RULES for found in rule(window))
