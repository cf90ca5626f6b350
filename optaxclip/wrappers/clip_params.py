"""Clips the parameters as they will be after the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import trees, validate, xla
from optaxclip.base import annotate
from optaxclip.engine import Description, description_of


@validate.named
def clip_params(clip: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Clips the parameters that a step leads to, not the step itself: u ← clip(w + u) - w.

    Put it last, after the learning rate. The clip determines the constraint:

    - `clip_by_leaf_norm(c)`: a cap on the norm of each leaf, the projection onto a ball;
    - `clip_by(c, scope=scopes.units())`: a cap for each unit, the max-norm constraint of the
      Dropout paper, Keras's `MaxNorm`;
    - `clip_by(c, norm=norms.rms, scope=scopes.leaf)`: a cap that leaves of all sizes can share;
    - `spectral_clip(c)`: a cap on singular values, and so on how much a layer can amplify;
    - `clip(c)`: each parameter limited to [-c, c], as in the critic of a Wasserstein GAN.

    Args:
      clip: a clip of this library or of Optax. Its own scope, `exclude=` and `axis_names=` apply,
        and its metrics describe parameters.

    Returns:
      A transformation with the state of `clip`, whose update needs `params`. Leaves within their
      bound get their updates unchanged, bit for bit.

    Raises:
      ValueError: if `clip` is not a transformation, or has `nonfinite="zero"`, which would set
        parameters to zero (use `skip_nonfinite(optimizer)` to skip such steps); at the update,
        without `params`.

    Deviations: parameters are clipped in at least float32, but updates keep their dtype. Adding
    them rounds, so parameters may exceed their bound by a rounding error.

    References:
      Srivastava et al., `Dropout <https://jmlr.org/papers/v15/srivastava14a.html>`_, 2014

    >>> import jax.numpy as jnp, optax, optaxclip
    >>> cap = optaxclip.wrappers.clip_params(optaxclip.clip_by_leaf_norm(5.0))
    >>> tx = optax.chain(optax.sgd(1.0), cap)
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(jnp.array([-3.0, -4.0]), tx.init(params), params)
    >>> updates  # without the cap [3, 4]
    Array([0., 0.], dtype=float32)
    """
    call = validate.called()
    if not validate.is_transformation(clip):
        raise validate.fail("clip must be a transformation, such as clip_by_leaf_norm(1.0)", clip)
    if description_of(clip).nonfinite == "zero":
        raise ValueError(
            f'{call}: a clip with nonfinite="zero" would set parameters to zero. Leave it out, and'
            " wrap the optimizer in skip_nonfinite."
        )
    clip = optax.with_extra_args_support(clip)

    def update_fn(updates, state, params=None, **extra_args):
        steps = trees.select(updates)
        pairs = zip(trees.match_params(steps, params, None, call), steps.arrays, strict=True)
        # In at least float32: a bfloat16 sum would lose most of the smaller number.
        own = [xla.widen(xla.widen(w), u.dtype) for w, u in pairs]
        ends = [xla.widen(u, w.dtype) + w for u, w in zip(steps.arrays, own, strict=True)]
        clipped, state = clip.update(steps.rebuild(ends), state, params, **extra_args)
        each = zip(steps.arrays, own, ends, trees.select(clipped).arrays, strict=True)
        return steps.rebuild([_way_to(*leaf) for leaf in each]), state

    # Without `inner`, because `check` would take the clip inside for one of updates.
    annotate(update_fn, description=Description(kind="other", name=call))
    return optax.GradientTransformationExtraArgs(clip.init, update_fn)


def _way_to(step: jax.Array, own: jax.Array, end: jax.Array, clipped: jax.Array) -> Any:
    """Computes the step from the parameters of a leaf to the clipped ones."""
    wide, change = xla.lie_alike(xla.widen(step, own.dtype), clipped - own)
    # If nothing was clipped, not the difference: w + u - w loses the last digits of u.
    return xla.as_dtype_of(step, jnp.where(clipped == end, wide, change))
