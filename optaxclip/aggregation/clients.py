"""How clients meet: each clips its own message, and what they agree on is the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from optaxclip import validate, xla
from optaxclip.base import annotate
from optaxclip.engine import Description
from optaxclip.states import StateGuard, init_inside
from optaxclip.thresholds.fixed import is_of_gradients
from optaxclip.trees import Leaves, drop_gradientless, select

Arrays = list[jax.Array]


class ClientState(NamedTuple):
    """What one client keeps. Trees are like the parameters, in float32 at least.

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
      clients: a `ClientState`, each leaf behind an axis of clients: of length 1 where a client
        runs, of all clients outside of `shard_map`.
    """

    mean: Any = ()
    clients: Any = ClientState()


class Meeting(NamedTuple):
    """One update, as one client sees it."""

    clip: optax.GradientTransformationExtraArgs
    axes: tuple[str, ...]
    leaves: Leaves
    params: Any
    extra_args: dict[str, Any]

    def send(self, arrays: Arrays, state: Any) -> tuple[Arrays, Any]:
        """Arrays in the place of the gradients after the clip, and the state of the clip."""
        # Of this client alone: pooled over all, one attacker's norm would shorten all the others.
        with xla.apart(self.axes):
            tree = self.leaves.rebuild(arrays)
            cut, state = self.clip.update(tree, state, self.params, **self.extra_args)
        # One NaN in a mean is a NaN for all, so whoever sends one sends nothing.
        return [keep_finite(x, jnp.zeros_like(x)) for x in select(cut).arrays], state

    def pool(self, arrays: Arrays) -> Arrays:
        """The mean over clients, the same for all of them by type."""
        # Of all, silent ones too: a mean of those who spoke would give the others more weight.
        return lax.pmean([xla.vary(x, self.axes) for x in arrays], self.axes)


# `(meeting, state) -> (updates, state)`, with trees as lists of their measured leaves.
Step = Callable[[Meeting, AggregateState], tuple[Arrays, AggregateState]]


def aggregate(
    clip: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    step: Step,
    start: Callable[[Any], AggregateState] = lambda params: AggregateState(),
) -> optax.GradientTransformationExtraArgs:
    """The transformation of one `step` that all clients take together.

    Args:
      clip: what each client does to its message.
      axis_name: the axis, or axes, along which clients lie.
      step: what is sent, and what becomes of it.
      start: the state before the first step, without that of the clip.
    """
    call, axes, clip = validate.called(), _as_axes(axis_name), _as_clip(clip)

    def init_fn(params):
        with validate.speak_for(call):
            state = start(params)
            own = state.clients._replace(clip=init_inside(call, clip, params))
            return state._replace(clients=_with_axis(own, axes))

    guard = StateGuard(call, AggregateState, init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        guard.check(state, drop_gradientless(params, updates))
        with validate.speak_for(call):
            # What clips leave out they pass on as it is: the mean is taken of that, too.
            leaves = select(updates)
            _check_clients(leaves, axes)
            old = AggregateState(state.mean, _without_axis(state.clients))
            meeting = Meeting(clip, axes, leaves, params, extra_args)
            out, new = step(meeting, _each(lambda tree: select(tree).arrays, old))
        new = _each(lambda tree, arrays: select(tree).rebuild(arrays), old, new)
        out = list(map(xla.as_dtype_of, leaves.arrays, out))
        return leaves.rebuild(out), new._replace(clients=_with_axis(new.clients, axes))

    annotate(update_fn, description=Description(kind="other", name=call, inner=clip))
    return optax.GradientTransformationExtraArgs(guard.init, update_fn)


def keep_finite(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, and `other` where it is NaN or infinite."""
    # Number by number: to agree on one answer, a client that is spread over devices would need a
    # collective. A clip by norm makes all of a block NaN anyway.
    return jnp.where(jnp.isfinite(x), x, other)


def average(decay: ArrayLike, old: Arrays, grads: Arrays) -> Arrays:
    """The running mean of gradients: decay · old + (1 - decay) · gradient."""
    decay = jnp.asarray(decay)
    return add(scale(decay, old), scale(1 - decay, list(map(xla.widen, grads))))


def scale(factor: ArrayLike, arrays: Arrays) -> Arrays:
    """Products, leaf by leaf."""
    return [xla.times(x, jnp.asarray(factor)) for x in arrays]


def add(a: Arrays, b: Arrays) -> Arrays:
    """Sums, leaf by leaf."""
    return [x + y for x, y in zip(a, b, strict=True)]


def subtract(a: Arrays, b: Arrays) -> Arrays:
    """Differences, leaf by leaf."""
    return [x - y for x, y in zip(a, b, strict=True)]


def _each(change: Callable[..., Any], *states: AggregateState) -> AggregateState:
    """The last of the states, with its trees changed, given those of all."""
    # By field, into new tuples: a checkpoint library may have restored another type.
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
    """The state of a client behind an axis of clients."""
    # A scalar has no axis along which those of many devices could leave `shard_map`. Varying from
    # `init` on, or `lax.scan` would find the type of its carry changed.
    return _map_arrays(lambda x: xla.vary(jnp.expand_dims(x, 0), axes), client)


def _without_axis(client: Any) -> Any:
    return _map_arrays(lambda x: x[0], client)


def _map_arrays(change: Callable[[Any], Any], tree: Any) -> Any:
    # An unfiltered model has functions among its leaves, and so have trees like it.
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
    """Raises where there are no clients, or they have no gradients of their own."""
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
            " Under plain jit gradients are the mean over clients already."
        ) from None
    if shared:
        raise ValueError(
            f"{validate.called()}: by type the gradient of {shared[0]!r} is the same for all"
            f" clients along {axes!r}, so none can be clipped by itself. In shard_map jax.grad of"
            " replicated parameters adds up over devices: write params ="
            f" jax.lax.pcast(params, {axes!r}, to='varying') before jax.grad, and no pmean or psum"
            " behind it."
        )
