"""Gradients of single examples, weighted and summed.

They are formed all at once, a few at a time, or never ("ghost" clipping):

    clipped_value_and_grad          as jax.value_and_grad, of a loss of one example
    ghost_parameters                which gradients it never forms
    per_example_global_norm_clip    and the two below: of gradients that you have, from
    vmap(grad(loss))
    per_example_layer_norm_clip
    per_example_normalize
"""

from optaxclip.per_example.clipped_grad import (
    ClippedExamples,
    clipped_value_and_grad,
    ghost_parameters,
)
from optaxclip.per_example.transforms import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
    per_example_normalize,
)

__all__ = [
    "ClippedExamples",
    "clipped_value_and_grad",
    "ghost_parameters",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "per_example_normalize",
]
