"""The z-score of the logarithm of the norm: Chorowski's rule of 2014, and the modern form of it."""

from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip.apply import Nonfinite
from optaxclip.core import clip_by
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.scopes import Scope, tree
from optaxclip.thresholds.combine import Threshold, as_threshold, at_most, clipped, raw
from optaxclip.thresholds.learned import Order, number
from optaxclip.thresholds.running import log_zscore


def clip_by_log_zscore(
    z_threshold: ArrayLike = 2.0,
    decay: ArrayLike = 0.95,
    *,
    target: Literal["mean", "threshold"] = "mean",
    order: Order = "before",
    warmup_steps: ArrayLike = 1,
    max_norm: Threshold = jnp.inf,
    scope: Scope = tree,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms over exp(μ + z·σ), μ and σ of log n, to exp(μ), the geometric mean.

    Norms are positive and skewed; their logarithms are nearly normal: a deviation is a factor, the same at any scale.

    Args:
      z_threshold: z, how many deviations over the mean make a spike.
      decay: β; the weight of the t-th norm is max(1 - β, 1/t).
      target: what a spike is shortened to: "mean": exp(μ), as in the paper; "threshold": exp(μ + zσ), which does not
        jump.
      order: "before", as in the authors' code: a norm is learned, as it is, before it is judged; so the first few can
        not be spikes. "after": it is judged by those before it, and a spike is learned at the length that it is cut to.
      warmup_steps: how many norms must have been seen; give some 25 with "after".
      max_norm: a cap on the bound.
      scope: which numbers share one norm: `tree`, `leaf`, `groups()`, `units()`.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for numbers out of range or an unknown target or order.

    Deviations: norms that are zero or not finite are not learned, so nothing is added inside the logarithm; the
    deviation is tracked directly, not as the difference of two large averages. With "after" the statistic starts anew
    after 100 spikes without a break.

    References:
      Chorowski et al., `End-to-end Continuous Speech Recognition using Attention-based Recurrent NN: First Results
      <https://arxiv.org/abs/1412.1602>`_, 2014

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_log_zscore(2.0, order="after", warmup_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 4.0, 9.0):  # the geometric mean is 2, one deviation is a factor of 2
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> round(float(updates[0]), 3)
    2.0
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    feed, again = (raw, None) if order == "before" else (clipped, 100)
    call = "clip_by_log_zscore"
    threshold = log_zscore(
        number(z_threshold, call, "z_threshold", 0.0),
        number(decay, call, "decay", 0.0, 1.0),
        warmup_steps=warmup_steps,
        target=target,
        feed=feed,
        order=order,
        relearn_after=again,
    )
    return clip_by(at_most(threshold, as_threshold(max_norm, call, "max_norm")), scope=scope, **shared)
