"""The clip that everybody means by "gradient clipping", and its siblings by leaf and by group."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip.actions import Action, band, rescale
from optaxclip.apply import Nonfinite
from optaxclip.core import clip_by
from optaxclip.leaves import Exclude
from optaxclip.mesh import AxisNames
from optaxclip.norms import Norm, l2, rms
from optaxclip.scopes import groups, leaf, module_of
from optaxclip.thresholds.combine import Threshold, as_threshold, checked


def _action(call: str, eps: jax.typing.ArrayLike, min_norm: jax.typing.ArrayLike) -> Action:
    """`rescale` with what is added to the norm, and with a floor under it."""
    eps, min_norm = checked(eps, call, "eps"), checked(min_norm, call, "min_norm")
    action = rescale if isinstance(min_norm, float | int) and min_norm == 0 else band(floor=min_norm)
    if isinstance(eps, float | int) and eps == 0:
        return action
    return lambda norms, bounds: action(norms + jnp.asarray(eps, norms.dtype), bounds)


def clip_by_global_norm(
    max_norm: Threshold,
    *,
    norm: Norm | float = l2,
    eps: jax.typing.ArrayLike = 0.0,
    min_norm: jax.typing.ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the updates by their global norm: g ← g · min(1, max_norm / ‖g‖), one norm over all leaves.

    Args:
      max_norm: the bound: a number, array, tracer, schedule or threshold.
      norm: another norm than the Euclidean one: `l1`, `linf`, or a number p for the p-norm.
      eps: added to the norm before it is compared and divided by. 0, as in Optax; 1e-6 is PyTorch's
        `clip_grad_norm_`, whose factor is min(1, max_norm / (‖g‖ + 1e-6)).
      min_norm: updates shorter than this (but not zero) are lengthened to it: against vanishing gradients.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string.

    Deviations from `optax.clip_by_global_norm`: the norm is taken in float32 at least, so float16 gradients do not
    overflow and bfloat16 norms are not rounded; zeros at a bound of 0 stay zeros; a norm equal to the bound changes
    nothing; an infinite gradient makes all updates NaN, not NaN here and 0 elsewhere; the state holds what happened.

    References:
      Pascanu et al., `On the difficulty of training Recurrent Neural Networks <https://arxiv.org/abs/1211.5063>`_, 2013

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'w': Array([0.6, 0.8], dtype=float32)}
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    call = "clip_by_global_norm"
    threshold = as_threshold(max_norm, call, "max_norm")
    return clip_by(threshold, norm=norm, action=_action(call, eps, min_norm), **shared)


def clip_by_leaf_norm(
    max_norm: Threshold,
    *,
    norm: Norm | float = l2,
    eps: jax.typing.ArrayLike = 0.0,
    min_norm: jax.typing.ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf by its own norm: gᵢ ← gᵢ · min(1, max_norm / ‖gᵢ‖). Keras calls it `clipnorm`.

    The direction of the whole gradient changes; under sharding by leaf it needs no communication.

    Args:
      max_norm: the bound, the same for every leaf, or an array with one number a leaf (paths sorted).
      norm, eps, min_norm, exclude, nonfinite, axis_names: as in `clip_by_global_norm`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_leaf_norm(1.0)
    >>> grads = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'b': Array([0.5], dtype=float32), 'w': Array([0.6, 0.8], dtype=float32)}
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    call = "clip_by_leaf_norm"
    threshold = as_threshold(max_norm, call, "max_norm")
    return clip_by(threshold, scope=leaf, norm=norm, action=_action(call, eps, min_norm), **shared)


def clip_by_group_norm(
    max_norm: Threshold | Mapping[str, jax.typing.ArrayLike],
    label: Callable[[str], str] | Mapping[str, str] | None = None,
    *,
    norm: Norm | float = l2,
    eps: jax.typing.ArrayLike = 0.0,
    min_norm: jax.typing.ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each group of leaves by the norm of the group; by default each layer: a module's kernel and bias together.

    Args:
      max_norm: the bound of every group, or a mapping of the name of each group to its own bound.
      label: the group of a leaf, as a function of its path (`blocks/0/attn/kernel`), or a mapping of regular
        expressions to names; None: the module. See `optaxclip.groups`.
      norm, eps, min_norm, exclude, nonfinite, axis_names: as in `clip_by_global_norm`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string; where a tree is first seen, if
        a leaf matches no pattern, or patterns of several groups, or if the names of `max_norm` are not those of the
        groups.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_group_norm({"head": 10.0, "body": 1.0}, {"^out": "head", "^hidden": "body"})
    >>> grads = {"hidden": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}, "out": {"w": jnp.array([5.0])}}
    >>> tx.update(grads, tx.init(grads))[0]["hidden"]
    {'b': Array([0.8], dtype=float32), 'w': Array([0.6], dtype=float32)}
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    call = "clip_by_group_norm"
    scope = groups(label or module_of)
    if isinstance(max_norm, Mapping):
        scope, max_norm = _exactly(scope, tuple(sorted(max_norm))), _stacked(max_norm, call)
    threshold = as_threshold(max_norm, call, "max_norm")
    return clip_by(threshold, scope=scope, norm=norm, action=_action(call, eps, min_norm), **shared)


def _stacked(max_norm: Mapping[str, Any], call: str) -> jax.Array:
    """The bounds of all groups as one vector, names sorted."""
    bounds = [checked(max_norm[name], call, f"max_norm[{name!r}]") for name in sorted(max_norm)]
    return jnp.stack([jnp.asarray(bound, jnp.float32) for bound in bounds])


def _exactly(scope, names: tuple[str, ...]):
    """The scope, if it cuts a tree into blocks with exactly these names."""

    def cut(paths, shapes):
        found = scope.cut(paths, shapes)
        if found.names != names:
            raise ValueError(
                f"clip_by_group_norm: max_norm names the groups {names}, but the leaves form {found.names}."
            )
        return found

    return scope._replace(cut=cut)


def clip_by_block_rms(
    threshold: Threshold,
    *,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf by its root mean square: u ← u / max(1, RMS(u) / threshold). Adafactor's update clipping.

    Place it after what preconditions the update and before the learning rate, as Adafactor does (threshold 1.0).

    Args:
      threshold: the bound: a number, array, tracer, schedule or threshold.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bound that is negative, NaN, a boolean or a string.

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_block_rms(1.0)
    >>> updates = jnp.array([3.0, 3.0])
    >>> tx.update(updates, tx.init(updates))[0]
    Array([1., 1.], dtype=float32)
    """
    shared = {"exclude": exclude, "nonfinite": nonfinite, "axis_names": axis_names}
    return clip_by(as_threshold(threshold, "clip_by_block_rms", "threshold"), scope=leaf, norm=rms, **shared)
