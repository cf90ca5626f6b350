"""The gradient of a batch, made of clipped gradients of its examples."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip.apply import as_dtype_of
from optaxclip.leaves import is_measured, path_string
from optaxclip.norms import widen
from optaxclip.per_example.ghost import Backward, by_ghost, by_vmap, mostly_ghost, trace
from optaxclip.per_example.weights import clip_weights, normal_weights
from optaxclip.thresholds.combine import checked

Method = Literal["auto", "ghost", "microbatch"]
_CALL = "clipped_value_and_grad"
# Examples in a microbatch: more cost memory and gain little, see tests/benchmarks/per_example.py.
_FEW = 8


class ClippedExamples(NamedTuple):
    """What happened to the examples of a batch.

    Attributes:
      losses: the loss of each example.
      norms: the norm of the gradient of each example, before the clip, in float32 at least.
      clipped: how many examples were made shorter, int32.
      nonfinite: how many examples weigh nothing because their loss or gradient is NaN or inf, int32.
      aux: what the loss of each example returned beside, with a leading axis; None without `has_aux`.
    """

    losses: jax.Array
    norms: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    aux: Any


def clipped_value_and_grad(
    loss: Callable[..., Any],
    max_norm: jax.typing.ArrayLike,
    *,
    method: Method = "auto",
    microbatch_size: int | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    has_aux: bool = False,
    gamma: jax.typing.ArrayLike | None = None,
) -> Callable[..., tuple[tuple[jax.Array, ClippedExamples], Any]]:
    """The gradient of each example clipped, then their mean: (1 / B) · Σᵢ gᵢ · min(1, max_norm / ‖gᵢ‖), B examples.

    Two methods, with the same result to rounding:

    - `"microbatch"` forms the gradients of `microbatch_size` examples at a time, and adds them up.
    - `"ghost"` finds the norms without the gradients (‖Σₜ xₜ ⊗ dyₜ‖² = Σₛₜ ⟨xₛ, xₜ⟩ · ⟨dyₛ, dyₜ⟩) and takes the
      weighted sum in one product of matrices: about the time and memory of a plain gradient, where most parameters are
      weights of dense layers, convolutions or embeddings that are used once, and activations are small beside them.
      Any framework will do; the loss is read as a jaxpr. Parameters that are used otherwise (biases; tied weights;
      layers in `lax.scan` or `jax.checkpoint`) are right too, but their gradients are formed for each example.
    - `"auto"` takes `"ghost"` if it has at least half of all parameters, else `"microbatch"`.

    Args:
      loss: `loss(params, example, *shared)`, the loss of one example: a scalar, or a pair (scalar, aux).
      max_norm: the largest norm of the gradient of one example.
      method: how; see `ghost_parameters` for what `"ghost"` reaches.
      microbatch_size: how many examples at a time, at most; None is 8 for `"microbatch"`, and all for `"ghost"`. It
        need not divide the batch. A microbatch takes examples from all over the batch, so that a batch that is sharded
        over devices stays so.
      reduce: `"mean"` or `"sum"`, of the losses and of the gradients.
      has_aux: whether the loss returns a pair.
      gamma: γ. If given, examples are not clipped but all get a norm of nearly `max_norm`, by max_norm / (‖gᵢ‖ + γ):
        AUTO-S, for which the authors take γ = 0.01 and a `max_norm` of 1.

    Returns:
      A function `(params, batch, *shared) -> ((value, examples), grads)`, as `jax.value_and_grad` of a loss with aux.
      The leaves of `batch` have a leading axis that numbers the examples; a random key for each example is one of
      them, `jax.random.split(key, B)`. `shared` is the same for all examples. `examples` is a `ClippedExamples`.
      `grads` has the dtypes of `params`; sums are taken in float32 at least.

      An example whose loss or gradient is not finite weighs nothing in `grads` and in `value`, and is counted. The
      mean of the gradients is over all B examples nevertheless, so that one example moves it by max_norm / B at most;
      the mean of the losses is over those that are finite.

    Raises:
      ValueError: if an argument is none of the above, a leaf of `params` holds no floating-point numbers, the leaves of
        `batch` have different leading sizes or none, or the loss is not a scalar.

    The norms of `"ghost"` are taken in a unit of each example's own, so that squares neither overflow nor vanish. Where
    the gradients of positions of one example nearly cancel, to 1/k of their size, its norm has a relative error of
    k² · 1e-7, that of the formed gradient k · 1e-7.

    References:
      Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016

      Li et al., `Large Language Models Can Be Strong Differentially Private Learners
      <https://arxiv.org/abs/2110.05679>`_, 2022

      Bu et al., `Differentially Private Optimization on Large Model at Small Cost <https://arxiv.org/abs/2210.00038>`_,
      2023; `Automatic Clipping <https://arxiv.org/abs/2206.07136>`_, 2023

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
    """
    _check_choices(method=(method, get_args(Method)), reduce=(reduce, ("mean", "sum")))
    _check_numbers(max_norm, gamma, microbatch_size)
    paired = functools.partial(_paired, loss, has_aux)

    def value_and_grad(params, batch, *shared):
        size, leaves = _batch_size(batch), _floating_leaves(params)
        backward, at_once = _plan(method, microbatch_size, paired, params, batch, shared)

        def step(chunk):
            batch, real = chunk
            back: Backward = backward(params, batch, shared)
            fine = jnp.isfinite(back.norms) & jnp.isfinite(back.losses)
            norms = jnp.where(fine, back.norms, jnp.nan)
            weights = clip_weights(norms, max_norm) if gamma is None else normal_weights(norms, max_norm, gamma)
            return back.sums(jnp.where(real, weights, 0)), (back.losses, back.norms, weights, fine, back.aux)

        zeros = [jnp.zeros_like(widen(x)) for x in leaves]
        sums, (losses, norms, weights, fine, aux) = _scan(step, batch, size, min(at_once or size, size), zeros)
        share = size if reduce == "mean" else 1
        grads = [as_dtype_of(x, total / share) for x, total in zip(leaves, sums, strict=True)]
        value = jnp.sum(jnp.where(fine, widen(losses), 0))
        value = value / jnp.sum(fine).astype(value.dtype) if reduce == "mean" else value
        counts = jnp.sum(fine & (weights < 1), dtype=jnp.int32), jnp.sum(~fine, dtype=jnp.int32)
        examples = ClippedExamples(losses, norms, *counts, aux)
        return (value.astype(losses.dtype), examples), jax.tree.structure(params).unflatten(grads)

    return value_and_grad


def ghost_parameters(loss: Callable[..., Any], params: Any, batch: Any, *shared: Any) -> tuple[str, ...]:
    """The paths of the parameters whose gradients `clipped_value_and_grad(loss, ..., method="ghost")` never forms.

    >>> import jax.numpy as jnp, optaxclip
    >>> params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    >>> optaxclip.ghost_parameters(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"])), params, jnp.ones((8, 4)))
    ('w',)
    """
    sites = trace(loss, params, batch, shared).sites
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(paths[i] for i in sorted(site.origin.parameter for site in sites))


def _plan(method, microbatch_size, loss, params, batch, shared):
    """The backward pass, and how many examples it takes at once (None: all)."""
    traced = None if method == "microbatch" else trace(loss, params, batch, shared)
    if traced is None or (method == "auto" and not mostly_ghost(traced, params)):
        return functools.partial(by_vmap, loss), microbatch_size or _FEW
    return functools.partial(by_ghost, traced), microbatch_size


def _scan(step, batch, size: int, at_once: int, zeros: list[jax.Array]):
    """The first results of `step` summed over microbatches, from `zeros`, and the others, for all examples in order.

    Microbatch k has the examples k, k + n, k + 2n, ... of n microbatches. What is missing in the last is filled up.
    """
    count = -(-size // at_once)
    at_once = -(-size // count)
    if count == 1:
        return step((batch, jnp.ones(size, bool)))

    def cut(x):
        x = x if size == at_once * count else x[np.minimum(np.arange(at_once * count), size - 1)]
        return x.reshape(at_once, count, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return x.swapaxes(0, 1).reshape(at_once * count, *x.shape[2:])[:size]

    def added(sums, chunk):
        more, each = step(chunk)
        return jax.tree.map(jnp.add, sums, more), each

    chunks = jax.tree.map(cut, batch), (np.arange(at_once * count) < size).reshape(at_once, count).T
    sums, each = lax.scan(added, zeros, chunks)
    return sums, jax.tree.map(joined, each)


def _paired(loss, has_aux: bool, params, example, *shared):
    """(loss, aux) of one example, checked."""
    out = loss(params, example, *shared)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"{_CALL}: with has_aux=True, loss must return a pair (loss, aux), got {type(out).__name__}.")
    value, aux = out if has_aux else (out, None)
    if isinstance(value, tuple | list):
        raise ValueError(f"{_CALL}: loss returned a {type(value).__name__}; for a pair (loss, aux) pass has_aux=True.")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"{_CALL}: loss must be one real number for one example, got {jnp.result_type(value)} of shape"
            f" {jnp.shape(value)}; loss sees an example without the batch axis, and must sum or average the rest."
        )
    return value, aux


def _check_choices(**choices) -> None:
    for argument, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{_CALL}: {argument} must be one of {', '.join(map(repr, known))}; got {value!r}.")


def _check_numbers(max_norm, gamma, microbatch_size) -> None:
    for argument, value in {"max_norm": max_norm, "gamma": 0 if gamma is None else gamma}.items():
        if jnp.ndim(checked(value, _CALL, argument)) != 0:
            raise ValueError(f"{_CALL}: {argument} must be one number, got an array of shape {jnp.shape(value)}.")
    whole = isinstance(microbatch_size, int) and not isinstance(microbatch_size, bool) and microbatch_size > 0
    if microbatch_size is not None and not whole:
        raise ValueError(
            f"{_CALL}: microbatch_size must be a whole number of examples, 1 or more, or None; got {microbatch_size!r}."
        )


def _batch_size(batch) -> int:
    shapes = {path_string(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            f"{_CALL}: every leaf of batch needs a leading axis that numbers the same examples, at least one; got"
            f" shapes {shapes}. What all examples share goes after batch: value_and_grad(params, batch, shared)."
        )
    return sizes.pop()[0]


def _floating_leaves(params) -> list[jax.Array]:
    flat = jax.tree_util.tree_leaves_with_path(params)
    others = [path_string(path) for path, x in flat if not is_measured(x)]
    if others:
        raise ValueError(
            f"{_CALL}: params must hold floating-point numbers, {', '.join(others)} does not. Split off what is not"
            " trained, and pass it after batch: value_and_grad(params, batch, shared)."
        )
    return [jnp.asarray(x) for _, x in flat]
