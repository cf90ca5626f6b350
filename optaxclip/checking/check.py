"""A linter for chains: what goes wrong silently, where, and what to write instead.

`chains` reads a chain off its closures, `kinds` says which nodes are clips, and of what kind, `rules` holds one
function a mistake.
"""

from typing import Any, NamedTuple

import optax

from optaxclip.checking.chains import described
from optaxclip.checking.rules import RULES
from optaxclip.findings import Findings


class Finding(NamedTuple):
    """One mistake in a chain.

    Attributes:
      name: a short name, which stays: "clip-after-normaliser".
      where: the way to it: "chain[1]/partition['decoder']/clip_by_global_norm".
      what: what goes wrong.
      mend: what to write instead.
    """

    name: str
    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.name}, at {self.where}: {self.what}\n    Instead: {self.mend}"


def check(tx: optax.GradientTransformation, params: Any) -> tuple[Finding, ...]:
    """Finds what goes wrong silently in a chain: clips in the wrong place, behind the wrong wrapper, without effect.

    Nothing is computed: the chain is read, not run. What it cannot read, a foreign wrapper, it passes over; what is
    sound, it leaves unmentioned. The findings are listed in docs/check.md.

    Args:
      tx: an optimizer, a chain, or any optax transformation.
      params: the parameters, or their shapes (`jax.eval_shape`): masks and labels are asked which leaves they mean.

    Returns:
      A tuple of `Finding`, empty if there are none; it prints well.

    Raises:
      TypeError: if `tx` is not an optax transformation.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optax.adam(1e-3), optax.clip_by_global_norm(1.0))
    >>> for finding in optaxclip.check(tx, {"w": jnp.ones(3)}):
    ...     print(finding.name, "at", finding.where)
    clip-after-normaliser at chain[1]/clip_by_global_norm
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"check: tx must be an optax transformation, got {type(tx).__name__}.")
    nodes = described(tx, params)
    found = [Finding(name, *finding) for name, rule in RULES.items() for finding in rule(nodes)]
    first = {(finding.name, finding.where): finding for finding in reversed(found)}
    return Findings(reversed(first.values()))
