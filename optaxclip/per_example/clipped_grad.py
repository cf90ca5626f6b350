"""The gradient of a batch, made of clipped gradients of its examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
from jax.typing import ArrayLike

from optaxclip import scopes, validate, xla
from optaxclip.actions import as_action
from optaxclip.base import Action, Scope
from optaxclip.per_example.bounds import as_bounds, check_bounds, cut_parameters
from optaxclip.per_example.examples import ClippedExamples, clip_some, sum_weights, summarize
from optaxclip.per_example.ghost import by_ghost, by_vmap, is_mostly_ghost, trace
from optaxclip.per_example.losses import (
    as_leaves,
    as_pair,
    as_weights,
    check_arrays,
    count_examples,
    vary_like,
)
from optaxclip.per_example.microbatches import scan_microbatches
from optaxclip.per_example.weights import weigh
from optaxclip.scopes.leaves import as_scope
from optaxclip.trees import select

Method = Literal["auto", "ghost", "microbatch"]
# More examples at a time cost memory and gain little, see tests/benchmarks/per_example.py.
_MICROBATCH_SIZE = 8


@validate.named
def clipped_value_and_grad(
    loss: Callable[..., Any],
    max_norm: ArrayLike | Mapping[str, ArrayLike],
    *,
    scope: Scope = scopes.tree,
    action: Action | None = None,
    method: Method = "auto",
    microbatch_size: int | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    keep_unclipped: bool = False,
) -> Callable[..., tuple[tuple[jax.Array, ClippedExamples], Any]]:
    """The gradient of each example clipped, then their mean: Σᵢ gᵢ · min(1, max_norm / ‖gᵢ‖) / B.

    Two methods, with the same result to rounding:

    - `"microbatch"` forms the gradients of `microbatch_size` examples at a time, and adds them up.
    - `"ghost"` finds the norms without the gradients (‖Σₜ xₜ ⊗ dyₜ‖² = Σₛₜ ⟨xₛ, xₜ⟩ · ⟨dyₛ, dyₜ⟩)
      and takes the weighted sum in one product of matrices: about the time and memory of a plain
      gradient, where most parameters are weights of dense layers, convolutions or embeddings that
      are used once, and activations are small beside them. Any framework will do; the loss is read
      as a jaxpr. Parameters that are used otherwise (biases; tied weights; layers in `lax.scan` or
      `jax.checkpoint`) are right too, but their gradients are formed for each example.
    - `"auto"` takes `"ghost"` if it has at least half of all parameters, else `"microbatch"`.

    Args:
      loss: `loss(params, example, *shared)`, the loss of one example: a scalar, or a pair
        (scalar, aux).
      max_norm: the largest norm of the gradient of one example. For a scope of several blocks: of
        each block; or a mapping from their names, or an array with one number for each.
      scope: which parameters share one norm of an example: `scopes.tree`, `scopes.leaf`, or
        `scopes.groups(label)`.
      action: what is done about an example: `actions.rescale` (None), `per_example.auto_s()` or
        `per_example.psac()`, which need no tuned bound, `actions.zero`, or any other
        `(norms, bounds) -> factors`.
      method: how; see `per_example.ghost_parameters` for what `"ghost"` reaches.
      microbatch_size: how many examples at a time, at most; None is 8 for `"microbatch"`, and all
        for `"ghost"`. It need not divide the batch. A microbatch takes examples from all over the
        batch, so that a batch that is sharded over devices stays so.
      reduce: `"mean"` or `"sum"`, of the losses and of the gradients.
      has_aux: whether the loss returns a pair.
      keep_batch_dim: whether the loss sees an example as a batch of one, with a leading axis of 1.
      keep_unclipped: whether `examples.unclipped` is to hold the gradient without the clip: what
        the clip changed on the whole, and what `per_example.error_feedback` needs.

    Returns:
      A function `(params, batch, *shared, weights=None) -> ((value, examples), grads)`, as
      `jax.value_and_grad` of a loss with aux. `batch` is any tree of arrays with a leading axis
      that numbers the examples; a random key for each example is one of them,
      `jax.random.split(key, B)`. `shared` is the same for all examples. `examples` is a
      `ClippedExamples`. `grads` has the dtypes of `params`; sums are taken in float32 at least.

      `weights`, (B,), is a mask of booleans, or numbers from 0 (what is negative or NaN counts
      as 0): for batches that are padded to a fixed size. The clipped gradient of example i is
      multiplied by wᵢ, and means are over Σw in place of B: of no example, zero. An example of
      weight 0 changes nothing but its own entries of `losses`, `norms` and `aux`, whatever is in
      it, NaN included.

      An example whose loss or gradient is not finite weighs nothing in `grads` and in `value`, and
      is counted. The mean of the gradients is over all B (or Σw) nevertheless; the mean of the
      losses is over those that are finite.

      One example, added or removed, moves the sum of the gradients (`reduce="sum"`) by
      max_norm · wᵢ at most: so private training adds noise in proportion to max_norm to that sum.
      With Poisson samples, divide it by the *expected* batch size: the size of a sample, which
      `reduce="mean"` divides by, is not private. With several blocks max_norm here is √Σₖ
      max_normₖ². All of this is so for actions that make no block longer than its bound, as all of
      ours but `actions.keep`.

      Inside `shard_map` each device clips its own examples, and returns their losses and gradients:
      pool them with `psum` or `pmean`, also where JAX would do so by itself for an unclipped loss.

    Raises:
      ValueError: if an argument is not a valid value; at the call, if a leaf of `params` holds no
        floating-point numbers, `batch` or `shared` hold what is no array (a string), the leaves of
        `batch` have different leading sizes, none or 0,
        `weights` do not fit, the loss is not a scalar, or it takes or returns statistics of the
        batch (BatchNorm): through them each example would change the gradients of all others.

    The norms of `"ghost"` are taken in a unit of each example's own, so that squares neither
    overflow nor vanish. Where the gradients of positions of one example nearly cancel, to 1/k of
    their size, its norm has a relative error of k² · 1e-7, that of the formed gradient k · 1e-7.

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016

      Li et al., `Large Language Models Can Be Strong Differentially Private Learners
      <https://arxiv.org/abs/2110.05679>`_, 2022

      Bu et al., `Differentially Private Optimization on Large Model at Small Cost
      <https://arxiv.org/abs/2210.00038>`_, 2023

      He et al., `Exploring the Limits of Differentially Private Deep Learning with Group-wise
      Clipping <https://arxiv.org/abs/2212.01539>`_, 2023: bounds by layer

    >>> import jax, jax.numpy as jnp, optaxclip
    >>> def loss(w, example):
    ...     x, y = example
    ...     return 0.5 * (x @ w - y) ** 2
    >>> step = jax.jit(optaxclip.clipped_value_and_grad(loss, max_norm=1.0))
    >>> batch = jnp.array([[3.0, 4.0], [0.5, 0.0]]), jnp.array([-1.0, -1.0])
    >>> (value, examples), grads = step(jnp.zeros(2), batch)
    >>> grads  # the mean of [3, 4] / 5 and [0.5, 0]
    Array([0.55, 0.4 ], dtype=float32)
    >>> examples.norms, int(examples.clipped), int(examples.nonfinite)
    (Array([5. , 0.5], dtype=float32), 1, 0)
    >>> step(jnp.zeros(2), batch, weights=jnp.array([True, False]))[1]  # the second is padding
    Array([0.6, 0.8], dtype=float32)

    A loss that is written for a batch, and needs its axis:

    >>> def mean_loss(w, batch):
    ...     x, y = batch
    ...     return 0.5 * jnp.mean((jnp.einsum("bi,i->b", x, w) - y) ** 2)
    >>> step = optaxclip.clipped_value_and_grad(mean_loss, max_norm=1.0, keep_batch_dim=True)
    >>> step(jnp.zeros(2), batch)[1]
    Array([0.55, 0.4 ], dtype=float32)
    """
    validate.choice(get_args(Method), method=method)
    validate.choice(("mean", "sum"), reduce=reduce)
    validate.flag(has_aux=has_aux, keep_batch_dim=keep_batch_dim, keep_unclipped=keep_unclipped)
    check_bounds(max_norm)
    scope, action = as_scope(scope), as_action(action)
    if microbatch_size is not None:
        validate.size(microbatch_size=microbatch_size)
    pair = as_pair(loss, has_aux, keep_batch_dim)

    def value_and_grad(params, batch, *shared, weights=None):
        check_arrays(params=params, batch=batch, shared=shared)
        # Before anything reads them: inside `shard_map` JAX sums a gradient by replicated
        # parameters over all devices.
        params = vary_like(params, (batch, shared))
        leaves, given = as_leaves(params), as_weights(weights, count_examples(batch))
        blocks = cut_parameters(scope, params)
        clip = functools.partial(weigh, action, bounds=as_bounds(max_norm, blocks))
        loss_of = (pair, blocks, params, batch, shared)
        backward, at_once = _plan(method, microbatch_size, *loss_of)

        def step(batch, given):
            # Clipped inside of the scan, which so carries one sum and no gradient of an example.
            return clip_some(backward(params, batch, shared), given, clip, keep_unclipped)

        like = [leaves] * (2 if keep_unclipped else 1)
        sums, each = scan_microbatches(step, batch, given, at_once, like)
        grads = [_finish(leaves, params, x, given, reduce) for x in sums]
        value, examples = summarize(each, given, reduce, blocks)
        return (value, examples._replace(unclipped=grads[1] if keep_unclipped else None)), grads[0]

    # Errors of a step, and its compiled program, are named after the call that made it.
    value_and_grad.__name__ = "clipped_value_and_grad"
    return validate.named(value_and_grad)


@validate.named
def ghost_parameters(
    loss: Callable[..., Any],
    params: Any,
    batch: Any,
    *shared: Any,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
) -> tuple[str, ...]:
    """The paths of the parameters whose gradients the method `"ghost"` never forms.

    All arguments are those of `clipped_value_and_grad` and of the function that it returns.

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    >>> def loss(p, x):
    ...     return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))
    >>> per_example.ghost_parameters(loss, params, jnp.ones((8, 4)))
    ('w',)
    """
    check_arrays(params=params, batch=batch, shared=shared)
    count_examples(batch)
    sites = trace(as_pair(loss, has_aux, keep_batch_dim), params, batch, shared).sites
    paths = select(params).paths
    return tuple(paths[i] for i in sorted(site.origin.parameter for site in sites))


def _finish(leaves, params, sums, given, reduce):
    """Sums of gradients as the tree of their sums or means."""
    if reduce == "mean":
        sums = [x / sum_weights(given).astype(x.dtype) for x in sums]
    # Rounded after the mean: the sum over a batch may overflow float16 where its mean does not.
    sums = [xla.as_dtype_of(x, g) for x, g in zip(leaves, sums, strict=True)]
    return jax.tree.structure(params).unflatten(sums)


def _plan(method, microbatch_size, loss, blocks, params, batch, shared):
    """Chooses the backward pass, and how many examples it takes at once (None: all)."""
    # Tracing runs the loss once more in Python, so only where something is to be chosen by it.
    traced = None if method == "microbatch" else trace(loss, params, batch, shared)
    if traced is None or (method == "auto" and not is_mostly_ghost(traced, params)):
        return functools.partial(by_vmap, loss, blocks), microbatch_size or _MICROBATCH_SIZE
    # All at once: ghost clipping keeps the activations, as a plain gradient of the batch does.
    return functools.partial(by_ghost, traced, blocks), microbatch_size
