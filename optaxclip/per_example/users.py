"""Clips by user instead of by example: all examples of one user are clipped as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip import validate
from optaxclip.per_example.losses import as_pair, count_examples


@validate.named
def group_by_user(
    batch: Any, users: jax.Array, *, max_examples: int, max_users: int | None = None
) -> tuple[Any, jax.Array]:
    """Puts the examples of each user side by side: a batch of users, for `user_loss`.

    Args:
      batch: any tree of arrays with a leading axis of B examples.
      users: (B,), integers: the user of each example, in any order and with gaps. An example with a
        negative user is padding.
      max_examples: K, how many examples of each user are taken, the first ones in the batch.
      max_users: U, the number of users there is room for; None is B, which is always enough. With
        less, users with the highest numbers are left out. Then one user may push out another and
        move the sum by twice the bound, so leave room for all.

    Returns:
      `(examples, present)`. The first holds the leaves of `batch` as (U, K, ...), the second (U, K)
      booleans, False where there is no example; a user's first example is repeated there. Users
      are in the order of their numbers. `present.sum()` is how many examples were taken.

    Raises:
      ValueError: if `users` are not B integers, or a size is not a whole number of at least 1.

    >>> import jax.numpy as jnp
    >>> from optaxclip import per_example
    >>> users = jnp.array([7, 3, 7, -1])
    >>> per_example.group_by_user(jnp.arange(4), users, max_examples=2, max_users=2)
    (Array([[1, 1],
           [0, 2]], dtype=int32), Array([[ True, False],
           [ True,  True]], dtype=bool))
    """
    size = count_examples(batch)
    rows = size if max_users is None else max_users
    validate.size(max_examples=max_examples, max_users=rows)
    table = _place(_as_numbers(users, size), rows, max_examples)
    present = table >= 0
    # Not zeros: a loss may have no gradient at zero, and NaN times 0 is NaN. Repeating a user's own
    # example cannot make the user any worse.
    source = jnp.where(present, table, jnp.maximum(table[:, :1], 0))
    return jax.tree.map(lambda x: jnp.asarray(x)[source], batch), present


def _as_numbers(users: Any, size: int) -> jax.Array:
    """Converts the users to a JAX array of integers, checked."""
    users = users if isinstance(users, jax.Array) else np.asarray(users)
    if users.shape != (size,) or not jnp.issubdtype(users.dtype, jnp.integer):
        got = f"{users.dtype} of shape {users.shape}"
        raise validate.fail(f"users must be {size} integers, one per example", got)
    # JAX would silently truncate them to 32 bits: two users would be merged, or become padding.
    cut = users.astype(jnp.result_type(users))
    if isinstance(users, np.ndarray) and not np.array_equal(cut, users):
        must = "users must be integers of 32 bits: write np.unique(users, return_inverse=True)[1]"
        raise validate.fail(must, f"numbers from {users.min()} to {users.max()}")
    return jnp.asarray(users)


def _place(users: jax.Array, rows: int, columns: int) -> jax.Array:
    """Lists the examples of each user in a row, (rows, columns), -1 where there is none."""
    # Sorted, not compared in pairs, because a private batch may have 100,000 examples. Padding goes
    # last, so that the first row belongs to a user.
    order = jnp.lexsort((users, users < 0))
    users, count = users[order], jnp.arange(users.size)
    first = jnp.concatenate([jnp.ones(1, bool), users[1:] != users[:-1]])
    row = jnp.where(users < 0, rows, jnp.cumsum(first) - 1)
    column = count - lax.cummax(jnp.where(first, count, 0))
    empty = jnp.full((rows, columns), -1, order.dtype)
    return empty.at[row, column].set(order, mode="drop")


@validate.named
def user_loss(
    loss: Callable[..., Any],
    *,
    reduce: Literal["mean", "sum"] = "mean",
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Makes the loss of one user from that of one example, for `clipped_value_and_grad`.

    A clip of examples hides one example, but not a user who gave a hundred of them. A clip by user
    bounds everything one user does to a step. The batch is what `group_by_user` returns:

        batch = per_example.group_by_user(examples, users, max_examples=4)
        step = clipped_value_and_grad(per_example.user_loss(loss), max_norm, reduce="sum")
        (value, seen), total = step(params, batch, weights=batch[1].any(axis=1))

    where rows without a user get weight 0. Everything in `clipped_value_and_grad` is then by user:
    `seen`, weights, microbatches, and ghost clipping, which pays if users have few examples.

    Args:
      loss: `loss(params, example, *shared)`, a scalar, or a pair (scalar, aux).
      reduce: `"mean"` or `"sum"` of a user's losses, whose gradient is clipped. The mean gives a
        user with few examples as much weight as one with many.
      has_aux: whether the loss returns a pair. The aux of a user has a leading axis of K.

    Returns:
      A function `(params, (examples, present), *shared)`.

    Raises:
      ValueError: for a bad argument; at the call, if the loss of an example is not a scalar.

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2018

    >>> import jax.numpy as jnp, optaxclip
    >>> from optaxclip import per_example
    >>> batch = per_example.group_by_user(
    ...     jnp.array([3.0, 1.0, 5.0]), jnp.array([0, 1, 0]), max_examples=2, max_users=2
    ... )
    >>> loss = per_example.user_loss(lambda w, x: w * x)
    >>> step = optaxclip.clipped_value_and_grad(loss, 2.0, reduce="sum")
    >>> float(step(1.0, batch)[1])  # of the means 4 and 1
    3.0
    """
    validate.choice(("mean", "sum"), reduce=reduce)
    validate.flag(has_aux=has_aux)
    pair = as_pair(loss, has_aux, False)

    def pooled(params, group, *shared):
        examples, present = group
        each = jax.vmap(pair, (None, 0, *(None for _ in shared)))
        losses, aux = each(params, examples, *shared)
        value = jnp.sum(jnp.where(present, losses, 0))
        if reduce == "mean":
            # At least 1, because a row without a user has no examples.
            value = value / jnp.maximum(jnp.sum(present), 1).astype(value.dtype)
        return (value, aux) if has_aux else value

    return pooled
