"""AutoClip: the bound is a percentile of the norms so far."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import Nonfinite
from optaxclip.core import clip_by
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.scopes import Scope, tree
from optaxclip.thresholds.combine import Threshold, as_threshold, at_most
from optaxclip.thresholds.learned import Order, number, whole
from optaxclip.thresholds.quantile import percentile as percentile_of_window


def autoclip(
    percentile: ArrayLike = 10.0,
    window: int = 1000,
    *,
    order: Order = "before",
    max_norm: Threshold = jnp.inf,
    warmup_steps: int | None = None,
    scope: Scope = tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to the p-th percentile of the last norms: τ = min(percentileₚ(n₁ … nₜ), max_norm).

    With the paper's p = 10 nine steps in ten are clipped, and updates have nearly one length; p = 95 clips outliers.

    Args:
      percentile: p, from 0 (the smallest norm so far) to 100 (no clipping).
      window: how many norms are remembered, a Python int: two float32 numbers each, a block.
      order: "before", as in the paper: a norm is among those that its bound is taken from; "after": it is not.
      max_norm: a cap on the bound, and the bound of the warm-up.
      warmup_steps: how many norms must have been seen; None: 1 for "before", the whole window for "after".
      scope: which numbers share one norm: `tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a percentile outside [0, 100], a window that is not a whole number of at least 1, a negative cap.

    Deviations: a window in place of the whole history, which grows without end; norms that are zero or not finite are
    not remembered (in the authors' code one NaN stays for ever). `autoclip(95.0, order="after", max_norm=1.0)` is the
    variant of TRELLIS.

    With a high percentile an explosion that lasts is followed upwards; give `max_norm`.

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation Networks
      <https://arxiv.org/abs/2007.14469>`_, 2020

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.autoclip(50.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 9.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates
    Array([3.], dtype=float32)
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    steps = warmup_steps if warmup_steps is not None else window if order == "after" else 1
    q, window = number(percentile, "autoclip", "percentile", 0.0, 100.0 + 1e-9), whole(window, "autoclip", "window")
    cap = as_threshold(max_norm, "autoclip", "max_norm")
    quantile = percentile_of_window(q, window, order=order, warmup_steps=steps, warmup=cap)
    return clip_by(at_most(quantile, cap), scope=scope, **shared)
