"""The gradient of a batch, made from the clipped gradients of its examples."""

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
# More examples at a time cost memory and gain little: see tests/benchmarks/per_example.py.
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
    """Clips the gradient of each example, then averages: Σᵢ gᵢ · min(1, max_norm / ‖gᵢ‖) / B.

    There are two methods, whose results agree up to rounding:

    - `"microbatch"` forms the gradients of `microbatch_size` examples at a time and adds them up.
    - `"ghost"` finds the norms without the gradients (‖Σₜ xₜ ⊗ dyₜ‖² = Σₛₜ ⟨xₛ, xₜ⟩ · ⟨dyₛ, dyₜ⟩)
      and computes the weighted sum in one matrix product. It takes about the time and memory of a
      plain gradient if most parameters are weights of dense layers, convolutions or embeddings
      that are used once, and activations are small by comparison. It works with any framework,
      because it reads the loss as a jaxpr. Parameters that are used otherwise (biases; tied
      weights; layers in `lax.scan` or `jax.checkpoint`) are handled correctly too, but their
      gradients are formed for each example.
    - `"auto"` is `"ghost"` if it covers at least half of all parameters, else `"microbatch"`.

    Args:
      loss: `loss(params, example, *shared)`, the loss of one example: a scalar, or a pair
        (scalar, aux).
      max_norm: the largest norm of the gradient of one example. If the scope has several blocks,
        the bound of each block, a mapping from their names, or an array with one number per block.
      scope: which parameters share one norm of an example: `scopes.tree`, `scopes.leaf`, or
        `scopes.groups(label)`.
      action: what happens to an example: `actions.rescale` (None), `per_example.auto_s()` or
        `per_example.psac()`, which need no tuned bound, `actions.zero`, or any other
        `(norms, bounds) -> factors`.
      method: one of the above; `per_example.ghost_parameters` lists what `"ghost"` covers.
      microbatch_size: the largest number of examples at a time; None is 8 for `"microbatch"`, and
        all for `"ghost"`. It need not divide the batch. A microbatch takes examples from all over
        the batch, so that a batch that is sharded over devices stays sharded.
      reduce: `"mean"` or `"sum"`, for both the losses and the gradients.
      has_aux: whether the loss returns a pair.
      keep_batch_dim: whether the loss sees an example as a batch of one, with a leading axis of 1.
      keep_unclipped: whether `examples.unclipped` holds the gradient without the clip, which shows
        what the clip changed overall, and which `per_example.error_feedback` needs.

    Returns:
      A function `(params, batch, *shared, weights=None) -> ((value, examples), grads)`, like
      `jax.value_and_grad` of a loss with aux. `batch` is any tree of arrays with a leading axis
      that numbers the examples; it may hold a random key for each example,
      `jax.random.split(key, B)`. `shared` is the same for all examples. `examples` is a
      `ClippedExamples`. `grads` has the dtypes of `params`; sums are taken in float32 at least.

      `weights`, (B,), is for batches that are padded to a fixed size: a mask of booleans, or
      numbers of at least 0 (negative numbers and NaN count as 0). The clipped gradient of example i
      is multiplied by wᵢ, and means divide by Σw instead of B; the mean over no example is zero. An
      example of weight 0 affects only its own entries of `losses`, `norms` and `aux`, whatever it
      contains, NaN included.

      An example whose loss or gradient is not finite is left out of `grads` and `value`, and is
      counted. The mean of the gradients still divides by B (or Σw); the mean of the losses is over
      the finite ones.

      Adding or removing one example changes the sum of the gradients (`reduce="sum"`) by at most
      max_norm · wᵢ. Private training therefore adds noise in proportion to max_norm to that sum.
      With Poisson samples, divide it by the *expected* batch size: the size of a sample, which
      `reduce="mean"` divides by, is not private. With several blocks, max_norm here is √Σₖ
      max_normₖ². All of this holds for actions that make no block longer than its bound, which is
      true of all of ours except `actions.keep`.

      Inside `shard_map` each device clips its own examples and returns their losses and gradients.
      Pool them with `psum` or `pmean`, even where JAX would do so itself for an unclipped loss.

    Raises:
      ValueError: if an argument is not a valid value; at the call, if a leaf of `params` does not
        hold floating-point numbers, `batch` or `shared` hold something other than arrays (such as
        a string), the leaves of `batch` have different leading sizes, none or 0, `weights` do not
        fit, the loss is not a scalar, or it takes or returns batch statistics (BatchNorm), through
        which each example would change the gradients of all others.

    `"ghost"` measures each example in a unit of its own, so that squares neither overflow nor
    vanish. If the gradients of positions of one example nearly cancel, to 1/k of their size, its
    norm has a relative error of k² · 1e-7; with formed gradients the error is k · 1e-7.

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

    A loss that is written for a batch and needs its axis:

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
        # Before anything reads them: inside `shard_map`, JAX sums the gradient with respect to
        # replicated parameters over all devices.
        params = vary_like(params, (batch, shared))
        leaves, given = as_leaves(params), as_weights(weights, count_examples(batch))
        blocks = cut_parameters(scope, params)
        clip = functools.partial(weigh, action, bounds=as_bounds(max_norm, blocks))
        loss_of = (pair, blocks, params, batch, shared)
        backward, at_once = _plan(method, microbatch_size, *loss_of)

        def step(batch, given):
            # Clipped inside the scan, which then carries one sum and no gradients of examples.
            return clip_some(backward(params, batch, shared), given, clip, keep_unclipped)

        like = [leaves] * (2 if keep_unclipped else 1)
        sums, each = scan_microbatches(step, batch, given, at_once, like)
        grads = [_finish(leaves, params, x, given, reduce) for x in sums]
        value, examples = summarize(each, given, reduce, blocks)
        return (value, examples._replace(unclipped=grads[1] if keep_unclipped else None)), grads[0]

    # Names the errors of a step and its compiled program after the public call.
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
    """Lists the paths of the parameters whose gradients the method `"ghost"` never forms.

    The arguments are those of `clipped_value_and_grad` and of the function that it returns.

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
    """Turns sums of gradients into the tree of their sums or means."""
    if reduce == "mean":
        sums = [x / sum_weights(given).astype(x.dtype) for x in sums]
    # Rounded after the mean: the sum over a batch may overflow float16 when its mean does not.
    sums = [xla.as_dtype_of(x, g) for x, g in zip(leaves, sums, strict=True)]
    return jax.tree.structure(params).unflatten(sums)


def _plan(method, microbatch_size, loss, blocks, params, batch, shared):
    """Chooses the backward pass and how many examples it takes at once (None: all)."""
    # Tracing runs the loss once more in Python, so it is skipped unless the choice depends on it.
    traced = None if method == "microbatch" else trace(loss, params, batch, shared)
    if traced is None or (method == "auto" and not is_mostly_ghost(traced, params)):
        return functools.partial(by_vmap, loss, blocks), microbatch_size or _MICROBATCH_SIZE
    # All at once: ghost clipping keeps the activations, just like a plain gradient of the batch.
    return functools.partial(by_ghost, traced, blocks), microbatch_size
