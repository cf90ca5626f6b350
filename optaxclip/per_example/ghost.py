"""One backward pass for the norms and the weighted sum of the gradients of all examples.

A zero, the probe, is added to the result of every site; its gradient is that of the result, dy. The
operands of a site and dy give the norms. They also give the weighted sum, by the same matrix
product that a plain gradient takes, with dyᵢ · weightᵢ instead of dyᵢ. The gradients of parameters
without a site are formed for each example and summed.

Bu et al., `Differentially Private Optimization on Large Model at Small Cost
<https://arxiv.org/abs/2210.00038>`_, 2023
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip.base import Blocks
from optaxclip.per_example.at_sites import find_units, site_norms, site_sum
from optaxclip.per_example.bounds import count_blocks
from optaxclip.per_example.convolutions import map_examples
from optaxclip.per_example.losses import Loss, vary_like
from optaxclip.per_example.sites import Site, find_sites
from optaxclip.per_example.walk import Program, flatten, get_aval
from optaxclip.per_example.weights import block_norms, weighted_sum
from optaxclip.trees import select
from optaxclip.xla import accumulator, widen


class Backward(NamedTuple):
    """The result of a backward pass over some examples.

    Attributes:
      losses: the loss of each example.
      aux: the aux of each example, with a leading axis.
      norms: (B, K), the norms of the gradient of each example, one per block.
      sums: `sums(weights)` for weights (B, K), the weighted sum of the gradients, one array per
        parameter, in float32 at least.
    """

    losses: jax.Array
    aux: Any
    norms: jax.Array
    sums: Callable[[jax.Array], list[jax.Array]]


def by_vmap(loss: Loss, blocks: Blocks, params: Any, batch: Any, shared: Sequence[Any]) -> Backward:
    """Forms the gradient of every example."""

    def each(example):
        return jax.value_and_grad(loss, has_aux=True)(params, example, *shared)

    (losses, aux), grads = map_examples(each)(batch)
    leaves = select(grads)

    def sums(weights):
        places = zip(leaves.arrays, blocks.index, strict=True)
        return [weighted_sum(x, weights[:, block]) for x, block in places]

    norms = _norms_by_block(blocks, leaves.paths, dict(enumerate(leaves.arrays)), {}, losses)
    return Backward(losses, aux, norms, sums)


class Traced(NamedTuple):
    """A loss traced for one example.

    Attributes:
      program: its operations.
      sites: one for each parameter whose gradient is not formed.
      rest: the indices of the parameters whose gradients are formed.
      outputs: the structure of (loss, aux).
    """

    program: Program
    sites: list[Site]
    rest: list[int]
    outputs: Any


def trace(loss: Loss, params: Any, batch: Any, shared: Sequence[Any]) -> Traced:
    """Traces the loss for one example of a batch.

    A parameter that the loss does not use has neither a site nor a gradient.
    """
    found = []

    def read(example):
        found.append(jax.make_jaxpr(loss, return_shape=True)(params, example, *shared))

    # Not traced with `x[0]`: only inside `vmap` does an example have the type, sharding included,
    # that the operations will see when they run.
    jax.vmap(read, out_axes=None)(batch)
    ((closed, shapes),) = found
    parameters = len(jax.tree.leaves(params))
    program = flatten(closed, parameters)
    sites, uses = find_sites(program), program.uses()
    used = {i for i, slot in enumerate(program.inputs[:parameters]) if uses[slot]}
    rest = sorted(used - {site.origin.parameter for site in sites})
    return Traced(program, sites, rest, jax.tree.structure(shapes))


def _run(traced: Traced, probes: list[jax.Array], arguments: list[Any]):
    """Runs the loss of one example with `probes` added at the sites: loss, (aux, operands)."""
    number = {site.op.outputs: i for i, site in enumerate(traced.sites)}
    seen: list[Any] = [None] * len(traced.sites)

    def at(op, operands, results):
        i = number.get(op.outputs)
        if i is None:
            return results
        # Without the parameter itself: returned from `vmap`, it would be copied for each example.
        seen[i] = [
            None if j == traced.sites[i].side else jnp.asarray(x) for j, x in enumerate(operands)
        ]
        return [results[0] + probes[i]]

    loss, aux = traced.outputs.unflatten(traced.program.run(arguments, at))
    return loss, (aux, seen)


def is_mostly_ghost(traced: Traced, params: Any) -> bool:
    """Whether the parameters at sites have at least half of all elements.

    If not, the gradients that are formed dominate the memory, and microbatches are as fast.
    """
    sizes = [jnp.size(x) for x in jax.tree.leaves(params)]
    at_sites = sum(sizes[site.origin.parameter] for site in traced.sites)
    return at_sites >= sum(sizes[i] for i in traced.rest)


def by_ghost(
    traced: Traced, blocks: Blocks, params: Any, batch: Any, shared: Sequence[Any]
) -> Backward:
    """Forms no gradient of a parameter that has a site."""
    leaves = list(map(jnp.asarray, jax.tree.leaves(params)))
    outputs = [get_aval(site.op.eqn.outvars[0]) for site in traced.sites]
    # Inside `shard_map`, typed like the examples: otherwise JAX would sum dy over the devices.
    probes = vary_like([jnp.zeros(y.shape, y.dtype) for y in outputs], params)

    def probed(rest, probes, example):
        arguments = [*leaves, *jax.tree.leaves((example, *shared))]
        for i, x in zip(traced.rest, rest, strict=True):
            arguments[i] = x
        return _run(traced, probes, arguments)

    def each(example):
        rest = [leaves[i] for i in traced.rest]
        return jax.value_and_grad(probed, argnums=(0, 1), has_aux=True)(rest, probes, example)

    (losses, (aux, operands)), (grads, dys) = map_examples(each)(batch)
    formed = dict(zip(traced.rest, grads, strict=True))
    places = [site.origin.parameter for site in traced.sites]
    found = map(find_units, traced.sites, operands, dys)
    at_sites = dict(zip(places, found, strict=True))

    def sums(weights):
        # Zeros for parameters that the loss does not use, which have neither a site nor a gradient.
        total = [jnp.zeros(x.shape, widen(x).dtype) for x in leaves]
        for i, g in formed.items():
            total[i] = weighted_sum(g, weights[:, blocks.index[i]])
        for i, at in at_sites.items():
            total[i] = site_sum(at, leaves[i], weights[:, blocks.index[i]])
        return total

    lengths = {i: site_norms(at) for i, at in at_sites.items()}
    norms = _norms_by_block(blocks, select(params).paths, formed, lengths, losses)
    return Backward(losses, aux, norms, sums)


def _norms_by_block(
    blocks: Blocks,
    paths: Sequence[str],
    formed: Mapping[int, jax.Array],
    lengths: Mapping[int, jax.Array],
    losses: jax.Array,
) -> jax.Array:
    """Combines the norms of formed gradients and of those at sites, by parameter, into (B, K)."""
    count, index = count_blocks(blocks), blocks.index
    parts = [(paths[i], x, index[i]) for i, x in formed.items()]
    for block in {index[i] for i in lengths}:
        parts.append(("sites", _stack([x for i, x in lengths.items() if index[i] == block]), block))
    if not parts:
        return jnp.zeros((losses.size, count), widen(losses).dtype)
    names, arrays, owners = zip(*parts, strict=True)
    return block_norms(arrays, names, owners, count)


def _stack(lengths: list[jax.Array]) -> jax.Array:
    """Stacks the norms at S sites as one more array, (B, S), whose norm is that of all sites."""
    wide = accumulator(lengths)
    return jnp.stack([n.astype(wide) for n in lengths], axis=1)
