"""Signs of exploding and vanishing gradients in a recorded run, with evidence and advice."""

from __future__ import annotations

from typing import Any

from optaxclip import validate
from optaxclip.monitoring.findings import Findings, Sign
from optaxclip.monitoring.history import Recorded, read_run
from optaxclip.monitoring.signs import find_signs


@validate.named
def diagnose(history: Recorded, *, losses: Any = None, param_norms: Any = None) -> tuple[Sign, ...]:
    """Looks for signs of exploding and vanishing gradients in a recorded run of steps.

    The docs list the signs and the numbers that define them. Causes come first, and what they
    explain is not said. Most rules need 20 steps, some 100; of fewer it says whether norms rose to
    NaN, and whether all was finite. A healthy run has no signs.

    Args:
      history: what `optaxclip.metrics` read at each step: a `History`, a sequence of dicts, or a
        dict of arrays with one entry a step, as `lax.scan` stacks them.
      losses: the loss at each step; None: what the history has under "loss", if anything.
      param_norms: the norm of all parameters at each step; None: what the history has under
        "param_norm", if anything.

    Returns:
      A tuple of `Sign`, empty if there are none; print it, or one of them, for a report.

    Raises:
      ValueError: if the history is empty, or has no norms.

    >>> import numpy as np, optaxclip
    >>> for sign in optaxclip.diagnose({"clip/grad_norm": 1.2 ** np.arange(40)}):
    ...     print(sign.name, sorted(sign.evidence))
    norms-exploding ['doubling_steps', 'first', 'growth', 'steps', 'usual']
    """
    run = read_run(history, loss=losses, param_norm=param_norms)
    if not len(run.norms):
        raise ValueError(
            f"diagnose: there is no key 'grad_norm' among {sorted(run.table)[:20]}: record"
            " optaxclip.metrics(opt_state), of a chain with optaxclip.watch() or a clip that"
            " measures in it."
        )
    return Findings(find_signs(run))


__all__ = ["Sign", "diagnose"]
