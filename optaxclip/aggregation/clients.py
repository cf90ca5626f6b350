"""One round of aggregation: each client clips its own message, and all of them take the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.compat import write_to_varying
from optaxclip.engine import Description, guarded
from optaxclip.states import init_inside
from optaxclip.thresholds.convert import is_of_gradients
from optaxclip.trees import Leaves, select

Arrays = list[jax.Array]


class ClientState(NamedTuple):
    """State of one client. Trees are like the parameters, in at least float32.

    Attributes:
      clip: the state of the clip.
      momentum: the running mean of its gradients; () for `clipped_mean`.
      sent: the sum of what it has sent; () for all but `clip21_sgd2m`.
    """

    clip: Any = ()
    momentum: Any = ()
    sent: Any = ()


class AggregateState(NamedTuple):
    """State of an aggregation, and a prefix of it for specs: `AggregateState(P(), P("clients"))`.

    Attributes:
      mean: the last mean, the same for all clients; () for `clipped_mean`.
      clients: a `ClientState`, whose leaves have a leading axis of clients: its length is 1 where a
        client runs, and the number of clients outside `shard_map`.
    """

    mean: Any = ()
    clients: Any = ClientState()


class Round(NamedTuple):
    """One update, as one client sees it."""

    clip: optax.GradientTransformationExtraArgs
    axes: tuple[str, ...]
    leaves: Leaves
    params: Any
    extra_args: dict[str, Any]

    def send(self, arrays: Arrays, state: Any) -> tuple[Arrays, Any]:
        """Clips arrays as if they were the gradients; returns them and the state of the clip."""
        # The norm of this client alone: pooled over all, one attacker would shorten all the others.
        with xla.apart(self.axes):
            tree = self.leaves.rebuild(arrays)
            cut, state = self.clip.update(tree, state, self.params, **self.extra_args)
        # One NaN would make the mean NaN for all, so it is replaced by zero.
        return [keep_finite(x, jnp.zeros_like(x)) for x in select(cut).arrays], state

    def pool(self, arrays: Arrays) -> Arrays:
        """Takes the mean over clients, which by type is the same for all of them."""
        # Over all clients, even those that sent nothing: leaving these out of the count would give
        # the others more weight.
        return lax.pmean([xla.vary(x, self.axes) for x in arrays], self.axes)


# `(round, state) -> (updates, state)`, with trees as lists of their measured leaves.
Step = Callable[[Round, AggregateState], tuple[Arrays, AggregateState]]


def aggregate(
    clip: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    step: Step,
    start: Callable[[Any], AggregateState] = lambda params: AggregateState(),
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from a `step` that all clients take together.

    Args:
      clip: what each client applies to its message.
      axis_name: the axis, or axes, of clients.
      step: what is sent, and how the messages become updates.
      start: the state before the first step, without that of the clip.
    """
    call, axes, clip = validate.called(), _as_axes(axis_name), _as_clip(clip)

    def init_fn(params):
        with validate.speak_for(call):
            state = start(params)
            own = state.clients._replace(clip=init_inside(call, clip, params))
            return state._replace(clients=_with_axis(own, axes))

    def update_fn(updates, state, params, **extra_args):
        with validate.speak_for(call):
            # Nothing is excluded here: the mean is also taken of leaves that the clip leaves alone.
            leaves = select(updates)
            _check_clients(leaves, axes)
            old = AggregateState(state.mean, _without_axis(state.clients))
            current = Round(clip, axes, leaves, params, extra_args)
            out, new = step(current, _each(lambda tree: select(tree).arrays, old))
        new = _each(lambda tree, arrays: select(tree).rebuild(arrays), old, new)
        out = list(map(xla.as_dtype_of, leaves.arrays, out))
        return leaves.rebuild(out), new._replace(clients=_with_axis(new.clients, axes))

    about = Description(kind="other", inner=clip)
    return guarded(AggregateState, init_fn, update_fn, about)


def keep_finite(x: jax.Array, other: jax.Array) -> jax.Array:
    """Replaces the numbers of `x` that are NaN or infinite by those of `other`."""
    # Element by element: one decision per client would need a collective if the client is spread
    # over devices. A clip by norm makes all of a block NaN anyway.
    return jnp.where(jnp.isfinite(x), x, other)


def average(decay: ArrayLike, old: Arrays, grads: Arrays) -> Arrays:
    """Updates a running mean of gradients: decay · old + (1 - decay) · gradient."""
    decay = jnp.asarray(decay)
    return add(scale(decay, old), scale(1 - decay, list(map(xla.widen, grads))))


def scale(factor: ArrayLike, arrays: Arrays) -> Arrays:
    """Multiplies leaf by leaf."""
    return [xla.times(x, jnp.asarray(factor)) for x in arrays]


def add(a: Arrays, b: Arrays) -> Arrays:
    """Adds leaf by leaf."""
    return [x + y for x, y in zip(a, b, strict=True)]


def subtract(a: Arrays, b: Arrays) -> Arrays:
    """Subtracts leaf by leaf."""
    return [x - y for x, y in zip(a, b, strict=True)]


def _each(change: Callable[..., Any], *states: AggregateState) -> AggregateState:
    """Replaces the trees of the last state by `change` of those of all states."""
    # Field by field into new tuples, because a checkpoint library may have restored another type.
    own = [state.clients for state in states]
    return AggregateState(
        change(*(state.mean for state in states)),
        ClientState(
            own[-1].clip,
            change(*(client.momentum for client in own)),
            change(*(client.sent for client in own)),
        ),
    )


def _with_axis(client: Any, axes: Sequence[str]) -> Any:
    """Adds an axis of clients to the state of one."""
    # Scalars need an axis along which `shard_map` can concatenate them. The state is varying from
    # `init` on, because otherwise `lax.scan` would find that the type of its carry changed.
    return _map_arrays(lambda x: xla.vary(jnp.expand_dims(x, 0), axes), client)


def _without_axis(client: Any) -> Any:
    return _map_arrays(lambda x: x[0], client)


def _map_arrays(change: Callable[[Any], Any], tree: Any) -> Any:
    # A model that was not filtered has functions among its leaves, and so do trees like it.
    return jax.tree.map(lambda x: change(x) if hasattr(x, "dtype") else x, tree)


def _as_axes(axis_name: Any) -> tuple[str, ...]:
    if not xla.is_names(axis_name) or axis_name == ():
        must = 'axis_name must be the axis of clients, such as "clients", or a tuple of axes'
        raise validate.fail(must, axis_name)
    return (axis_name,) if isinstance(axis_name, str) else axis_name


def _as_clip(clip: Any) -> optax.GradientTransformationExtraArgs:
    # A threshold has the same two functions, and would fail only at the update.
    if not validate.is_transformation(clip) or not is_of_gradients(clip):
        must = "clip must be a transformation of gradients, such as clip_by_global_norm(1.0)"
        raise validate.fail(must, clip)
    return optax.with_extra_args_support(clip)


def _check_clients(leaves: Leaves, axes: tuple[str, ...]) -> None:
    """Raises if there is no axis of clients, or if they do not have their own gradients."""
    try:
        shared = [
            path
            for path, x in zip(leaves.paths, leaves.arrays, strict=True)
            if xla.is_shared(x, axes)
        ]
        lax.axis_size(axes)
    except NameError:
        raise ValueError(
            f"{validate.called()}: there is no axis {axes!r} here: call tx.update inside"
            " jax.shard_map over a mesh with this axis, or inside jax.vmap(..., axis_name=...)."
            " Under plain jit, gradients are already the mean over clients."
        ) from None
    if shared:
        raise ValueError(
            f"{validate.called()}: by type the gradient of {shared[0]!r} is the same for all"
            f" clients along {axes!r}, so none can be clipped by itself. In shard_map, jax.grad of"
            " replicated parameters adds up over devices: write params ="
            f" {write_to_varying('params', axes)} before jax.grad, and no pmean or psum after it."
            " An optax.MultiSteps around the aggregation begins with zeros of this type: write"
            " optax.chain(aggregation, optax.MultiSteps(...))."
        )
