"""A linter for chains: what goes wrong silently, where, and what to write instead.

`chains` reads a chain, `kinds` tells which nodes are clips, and of what kind; `placement`, `misuse`
and `aggregations` have one function per mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from optaxclip.checking import aggregations, misuse, placement
from optaxclip.checking.chains import Node, read_chain
from optaxclip.checking.kinds import Found
from optaxclip.monitoring.display import code, escape
from optaxclip.monitoring.findings import Findings
from optaxclip.validate import is_maker, is_transformation, show_maker

# In the order of the report. Each mistake has one function, which does not need the others.
_RULES: dict[str, Callable[[list[Node]], Found]] = {
    "clip-per-branch": placement.clip_per_branch,
    "frozen-in-norm": placement.frozen_in_norm,
    "clip-after-normaliser": placement.clip_after_normaliser,
    "spike-test-after-clip": placement.spike_test_after_clip,
    "watch-after-clip": placement.watch_after_clip,
    "clip-before-accumulation": placement.clip_before_accumulation,
    "clip-before-unscale": placement.clip_before_unscale,
    "guard-after-clip": misuse.guard_after_clip,
    "guard-without-optimizer": misuse.guard_without_optimizer,
    "guard-in-accumulation": misuse.guard_in_accumulation,
    "clip-before-sign": placement.clip_before_sign,
    "clip-twice": placement.clip_twice,
    "threshold-as-clip": misuse.threshold_as_clip,
    "optimizer-as-threshold": misuse.optimizer_as_threshold,
    "idle-exclude": misuse.idle_exclude,
    "clip-before-aggregation": aggregations.clip_before_aggregation,
    "guard-around-aggregation": aggregations.guard_around_aggregation,
    "aggregation-after-normaliser": aggregations.aggregation_after_normaliser,
}


class Finding(NamedTuple):
    """One mistake in a chain.

    Attributes:
      name: a short, stable name: "clip-after-normaliser".
      where: the path to it: "chain[1]/partition['decoder']/clip_by_global_norm".
      what: what goes wrong.
      fix: what to write instead.
    """

    name: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}, at {self.where}: {self.what}\n    Instead: {self.fix}"

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        where = f"**{self.name}**, at {code(self.where)}"
        return f"{where}: {escape(self.what)}<br>*Instead:* {escape(self.fix)}"


def check(tx: optax.GradientTransformation, params: Any) -> tuple[Finding, ...]:
    """Finds silent mistakes in a chain: clips in the wrong place, or without effect.

    The chain is read, not run. What a foreign wrapper does cannot be read, so nothing is reported
    across it, but its inside is checked. All findings are listed in docs/check.md.

    Args:
      tx: an optimizer, a chain, or any optax transformation.
      params: the parameters, or their shapes (`jax.eval_shape`), to which masks, labels and
        `exclude` are applied.

    Returns:
      A tuple of `Finding`, printed one below the other; empty if the chain is sound.

    Raises:
      TypeError: if `tx` is not an optax transformation.

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> tx = optax.chain(optax.adam(1e-3), optax.clip_by_global_norm(1.0))
    >>> for finding in optaxclip.check(tx, {"w": jnp.ones(3)}):
    ...     print(finding.name, "at", finding.where)
    clip-after-normaliser at chain[1]/clip_by_global_norm
    """
    # A state or a trainer has no closures to read, and would be reported as sound.
    if not is_transformation(tx):
        got = show_maker(tx) if is_maker(tx) else type(tx).__name__
        raise TypeError(f"check: tx must be an optax transformation, got {got}.")
    nodes = read_chain(tx, params)
    # Exceptions are not caught: if a rule fails, the chain must not count as sound.
    found = [Finding(name, *finding) for name, rule in _RULES.items() for finding in rule(nodes)]
    # A clip may be part of several pairs. Only the first of equal mistakes at a place is reported.
    first = {(finding.name, finding.where): finding for finding in reversed(found)}
    return Findings(reversed(first.values()))
