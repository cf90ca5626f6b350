"""What everybody means by "gradient clipping", and its siblings by leaf and by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from optaxclip import scopes, trees, validate, xla
from optaxclip.actions import band, rescale
from optaxclip.base import (
    Action,
    AxisNames,
    Exclude,
    Label,
    Nonfinite,
    Norm,
    Part,
    Stacked,
    Threshold,
)
from optaxclip.clips.bounds import bound_leaves
from optaxclip.core import clip_by
from optaxclip.norms import as_norm, l2
from optaxclip.thresholds.by_name import each_by_name
from optaxclip.thresholds.convert import as_threshold


@validate.named
def global_norm(
    tree: Any,
    *,
    norm: Norm | float = l2,
    exclude: Exclude = None,
    axis_names: AxisNames | None = None,
) -> jax.Array:
    """Computes the norm over all leaves of a tree, ‖g‖, as `clip_by_global_norm` measures it.

    It is a scalar in float32 (float64 if any leaf is), accurate from 1e-36 to 1e36 for any dtype of
    the leaves, with a derivative of 0 at zeros. An empty tree has the norm 0. Sharded arrays are
    measured in place: the norm is that of whole arrays, and none is gathered (as long as similar
    layers, whose paths differ only in numbers, are sharded alike).

    Args:
      tree: gradients, parameters, or any tree. Leaves of real and complex floating-point numbers
        count; integers, `None` and functions do not.
      norm: `norms.l2`, `l1`, `linf`, `rms`, or a number p for the p-norm.
      exclude, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a norm or `exclude` that is not a valid value; inside
        `shard_map(check_vma=False)` or `pmap`, without `axis_names`.

    Deviations from `optax.global_norm`, which squares in the dtype of the leaves: float16 does not
    overflow from 256 on; inside `shard_map` the norm covers the parts on all devices.

    >>> import jax.numpy as jnp, optaxclip
    >>> optaxclip.global_norm({"w": jnp.array([3.0, 4.0], jnp.float16)})
    Array(5., dtype=float32)
    """
    validate.exclude(exclude)
    norm = as_norm(norm)
    # Cut, laid out and measured as in a clip, so that the norm logged is the norm clipped by.
    leaves = trees.select(tree, exclude)
    span = xla.find_span(leaves.arrays, leaves.paths, axis_names)
    blocks = scopes.tree.cut(leaves.paths, leaves.shapes)
    return xla.measure(norm, leaves.arrays, xla.lay_out(blocks, leaves.paths, leaves.shapes, span))


def _make_action(eps: ArrayLike, min_norm: ArrayLike) -> Action:
    """Makes a `rescale` that adds `eps` to the norm and lengthens updates to `min_norm`."""
    validate.nonnegative(eps=eps, min_norm=min_norm)
    # The plain action if possible, because `check` recognizes a hard clip by it. A tracer may be 0
    # now but not later.
    plain = validate.is_static(min_norm) and min_norm == 0
    action = rescale if plain else band(floor=min_norm)
    if validate.is_static(eps) and eps == 0:
        return action
    # Added before the comparison, as in PyTorch, whose factor is just below 1 at the bound.
    name = f"{action!r} of norms + {eps}"
    # A `Part` has a name; otherwise a reader of the chain would see only a bare lambda.
    return Part(name, lambda norms, bounds: action(norms + xla.like(eps, norms), bounds))


@validate.named
def clip_by_global_norm(
    max_norm: Threshold,
    *,
    norm: Norm | float = l2,
    eps: ArrayLike = 0.0,
    min_norm: ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the updates by one norm over all leaves: g ← g · min(1, max_norm / ‖g‖).

    Args:
      max_norm: the bound: a number, array, tracer, schedule or threshold.
      norm: a norm other than the Euclidean one: `norms.l1`, `norms.linf`, or a number p for the
        p-norm.
      eps: added to the norm before comparing and dividing. 0 is Optax; 1e-6 is PyTorch's
        `clip_grad_norm_`, whose factor is min(1, max_norm / (‖g‖ + 1e-6)).
      min_norm: lengthens updates shorter than this (but not zero) to this norm, against vanishing
        gradients.
      exclude, nonfinite, axis_names: as in `optaxclip.clip_by`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string.

    Deviations from `optax.clip_by_global_norm`: the norm is taken in float32 at least, so float16
    gradients do not overflow and bfloat16 norms are not rounded; zeros at a bound of 0 stay zeros;
    a norm equal to the bound changes nothing; an infinite gradient makes all updates NaN, not some
    NaN and the rest 0; the state records what happened.

    References:
      Pascanu et al., `On the difficulty of training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2013

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'w': Array([0.6, 0.8], dtype=float32)}
    """
    return clip_by(
        # Here, because errors from `clip_by` would name its own argument, `threshold`.
        as_threshold(max_norm=max_norm),
        norm=norm,
        action=_make_action(eps, min_norm),
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )


@validate.named
def clip_by_leaf_norm(
    max_norm: Threshold | Any,
    *,
    norm: Norm | float = l2,
    eps: ArrayLike = 0.0,
    min_norm: ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf by its own norm: gᵢ ← gᵢ · min(1, max_norm / ‖gᵢ‖).

    Keras calls this `clipnorm`. It changes the direction of the whole gradient. If each leaf is on
    one device, it needs no communication.

    Args:
      max_norm: the bound of every leaf: a number, tracer, schedule or threshold. Or one per leaf: a
        tree of them with the structure of the updates, or a mapping of paths (`blocks/0/kernel`).
        inf means no bound. See `thresholds.by_name`.
      norm, eps, min_norm, exclude, nonfinite, axis_names: as in `clip_by_global_norm`.
      stacked: which leaves stack layers (as by `nn.scan`): each layer has its own norm, and in a
        tree of bounds such a leaf may have a list or vector of them. See `scopes.stacked`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string; at the
        update, if `max_norm` is a bare vector, or if its paths are not those of the leaves; for
        `stacked`, as in `scopes.stacked`.

    >>> import jax.numpy as jnp, optaxclip
    >>> tx = optaxclip.clip_by_leaf_norm({"b": 0.1, "w": 1.0})
    >>> grads = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'b': Array([0.1], dtype=float32), 'w': Array([0.6, 0.8], dtype=float32)}
    """
    return clip_by(
        bound_leaves(exclude, max_norm=max_norm),
        scope=scopes.leaf if stacked is None else scopes.stacked(stacked),
        norm=norm,
        action=_make_action(eps, min_norm),
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )


@validate.named
def clip_by_group_norm(
    max_norm: Threshold | Mapping[str, Any],
    label: Label | None = None,
    *,
    norm: Norm | float = l2,
    eps: ArrayLike = 0.0,
    min_norm: ArrayLike = 0.0,
    exclude: Exclude = None,
    nonfinite: Nonfinite = "propagate",
    axis_names: AxisNames | None = None,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each group of leaves by the norm of the group, by default a module's kernel and bias.

    Args:
      max_norm: the bound of every group: a number, tracer, schedule or threshold. Or a mapping from
        the name of each group to one: `{"embed": optax.linear_schedule(10.0, 1.0, 1000),
        "attn": thresholds.zscore(), "rest": 1.0}`. See `thresholds.by_name`.
      label: the group of a leaf, as a function of its path (`blocks/0/attn/kernel`), or a mapping
        from regular expressions to names; None: the module. See `scopes.groups`.
      norm, eps, min_norm, exclude, nonfinite, axis_names: as in `clip_by_global_norm`.
      stacked: which leaves stack layers: a group of these has a norm per layer, and in a mapping of
        bounds either one bound for all or a list of them (`{"blocks/attn": [1.0, 0.5], "head":
        1.0}`). See `scopes.stacked`.

    Raises:
      ValueError: for a bound, eps or floor that is negative, NaN, a boolean or a string; for a
        scope instead of a label; when a tree is first seen, if a leaf matches no pattern, or
        patterns of several groups; for `stacked`, as in `scopes.stacked`; at the update, if the
        names of `max_norm` are not those of the groups.

    >>> import jax.numpy as jnp, optaxclip
    >>> by_part = {"^out": "head", "^hidden": "body"}
    >>> tx = optaxclip.clip_by_group_norm({"head": 10.0, "body": 1.0}, by_part)
    >>> hidden = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> grads = {"hidden": hidden, "out": {"w": jnp.array([5.0])}}
    >>> tx.update(grads, tx.init(grads))[0]["hidden"]
    {'b': Array([0.8], dtype=float32), 'w': Array([0.6], dtype=float32)}
    """
    # The default is None, not the function: `optax.inject_hyperparams` would take a function for a
    # schedule and call it with the step.
    scope = scopes.groups(scopes.module_of if label is None else label)
    # A mapping holds bounds by name. Any other tree would hold bounds by leaf, not by group.
    if isinstance(max_norm, Mapping):
        threshold = each_by_name(max_norm=max_norm)
    else:
        threshold = as_threshold(max_norm=max_norm)
    return clip_by(
        threshold,
        scope=scope if stacked is None else scopes.stacked(stacked, scope),
        norm=norm,
        action=_make_action(eps, min_norm),
        exclude=exclude,
        nonfinite=nonfinite,
        axis_names=axis_names,
    )
