"""Where the four parts meet.

Every clip in this library answers four questions, and each answer is a separate part:

    scope      which numbers share one norm?          scopes.tree, leaf, groups, stacked,
                                                      units, element
    norm       how long is a block?                   norms.l2, l1, linf, rms, lp(p)
    threshold  how long may it be?                    a number, a schedule, or an optax
                                                      transformation of norms into bounds
    action     what happens to a longer one?          actions.rescale, normalize, zero,
                                                      smooth(p), band(low)

Data flows one way, once: the updates are cut into blocks and measured in one read, the threshold
turns norms into bounds, the action turns both into factors, and each leaf is multiplied by the
factor of its block.

    updates --cut, measure--> norms --threshold--> bounds --action--> factors --multiply--> updates

Norms, bounds and factors have the same shape (see `optaxclip.base`), so no part needs to know the
scope. How the sum and the multiply are written for each compiler is decided in `optaxclip.xla` and
nowhere else.
"""

from __future__ import annotations

import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import scopes, validate, xla
from optaxclip.actions import as_action
from optaxclip.base import (
    Action,
    AxisNames,
    Exclude,
    Nonfinite,
    Norm,
    Norms,
    Scope,
    SizedView,
    Threshold,
    View,
)
from optaxclip.engine import Description, Rule, build
from optaxclip.norms import as_norm, l2
from optaxclip.record import Step
from optaxclip.scopes.leaves import as_scope
from optaxclip.thresholds.convert import as_threshold
from optaxclip.trees import Leaves


@validate.named
def clip_by(
    threshold: Threshold,
    *,
    scope: Scope = scopes.tree,
    norm: Norm | float = l2,
    action: Action | None = None,
    view: View | SizedView | None = None,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each block of the updates to its bound: g ← g · action(‖g‖, bound).

    Args:
      threshold: the bound: a number from 0 to inf, an array or tracer, a schedule (a function of
        the step), or a threshold, which is an optax transformation of norms into bounds.
      scope: which numbers share one norm: `scopes.tree`, `scopes.leaf`, `scopes.groups(label)`,
        `scopes.stacked(where)`, `scopes.units(axes)`, or `scopes.element`, each by itself.
      norm: how long a block is: `norms.l2`, `l1`, `linf`, `rms`, or a number p for the p-norm.
      action: what happens to a block that is too long: `actions.rescale`, `normalize`, `zero`,
        `smooth(p)`, `band(low)`, or a function `(norms, bounds) -> factors`. None means `rescale`:
        a function as the default would be taken for a schedule by `optax.inject_hyperparams`.
      view: what is measured instead of the updates: a function of a leaf and its parameters, both
        in at least float32, that returns an array of the same shape, such as
        `lambda g, w: g / (abs(w) + 1e-3)`. Inside `shard_map` it sees the part on one device; a
        view that needs the size of whole leaves is a `base.SizedView`.
      exclude: leaves to leave alone, neither measured nor changed: a regular expression searched in
        the path, or a predicate of the path.
      nonfinite: what happens to a block that contains NaN or inf: "propagate" makes all of it NaN,
        "zero" sets all of it to exact zeros. Neither moves the statistics of a threshold. A block
        whose norm exceeds the largest float, or whose factor is below the smallest normal float
        (1e-38), counts as not finite.
      axis_names: inside `shard_map(check_vma=False)`, `pmap` or `vmap(axis_name=...)`, the mesh
        axes over which the gradients are spread: a name or tuple of names, a function of the path,
        or a tree of these. () if they are already the same on every device. Not needed under plain
        `jit`, nor in `shard_map` with `check_vma=True`.

    Returns:
      A `GradientTransformationExtraArgs` with a `ClipState`. `update(updates, None)` starts from a
      fresh state where the threshold keeps none.

    Raises:
      ValueError: for a threshold that is negative, NaN, a boolean or a string; for an invalid
        scope, norm, action, `exclude` or `nonfinite`; at the update, for the state of another
        transformation, for blocks other than those of `init`, or if parameters are needed but not
        passed.

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import actions, scopes
    >>> tx = optaxclip.clip_by(1.0, scope=scopes.leaf, action=actions.smooth(1.0))
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([1.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'a': Array([0.75], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    threshold, norm, action = as_threshold(threshold=threshold), as_norm(norm), as_action(action)
    bad = factor_of_bad(nonfinite)

    def measure(leaves: Leaves, layout: xla.Layout) -> Norms:
        return xla.measure(norm, leaves.arrays, layout)

    def act(leaves: Leaves, layout: xla.Layout, lengths: Norms, bounds: Norms):
        step = decide(lengths, bounds, action, bad)
        # 0 · inf is NaN, so exact zeros need a select. Only this policy pays for it.
        return xla.scale(leaves.arrays, step.factors, layout=layout, zeros=bad == 0), step

    description = Description(as_scope(scope), norm, threshold, action, view, exclude, nonfinite)
    return build(description, Rule(measure, act), axis_names)


def factor_of_bad(nonfinite: Nonfinite) -> float:
    """What a block that is not finite is multiplied by: NaN or 0."""
    validate.choice(get_args(Nonfinite), nonfinite=nonfinite)
    # A Python number: a jax array made here during a trace would leak into later updates.
    return math.nan if nonfinite == "propagate" else 0.0


def decide(norms: Norms, bounds: Norms, action: Action, bad: float) -> Step:
    """One factor per block; `bad` if the block is not finite. Negative bounds count as 0."""
    # Norms of units are one array per set of alike leaves, of different shapes.
    if isinstance(norms, list):
        rows = [decide(n, b, action, bad) for n, b in zip(norms, bounds, strict=True)]
        return Step(*map(list, zip(*rows, strict=True))) if rows else Step([], [], [], [], [])
    # A threshold such as mean - σ may go below 0, and a negative factor would turn descent into
    # ascent.
    bounds = jnp.maximum(bounds.astype(norms.dtype), 0)
    finite = jnp.isfinite(norms)
    # Actions never see NaN: the derivative would be NaN, even where the factor is replaced below.
    factors = action(jnp.where(finite, norms, 0), bounds).astype(norms.dtype)
    # XLA flushes a factor below the smallest normal float to zero, and the block would silently
    # vanish. This is read off norm and bound, because the factor itself is already 0.
    stays = (bounds <= 0) | (bounds >= norms * jnp.finfo(norms.dtype).tiny)
    fine = finite & jnp.isfinite(factors) & stays
    factors = xla.poison(fine, factors) if np.isnan(bad) else jnp.where(fine, factors, 0)
    return Step(norms, bounds, factors, (norms > bounds).astype(norms.dtype), ~fine)
