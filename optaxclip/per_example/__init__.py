"""Gradients of single examples, weighted and summed.

They are formed all at once, a few at a time, or never ("ghost" clipping):

    clipped_value_and_grad          like jax.value_and_grad, for a loss of one example
    ghost_parameters                the parameters whose gradients it never forms
    auto_s, psac                    actions for examples, in addition to `optaxclip.actions`
    group_by_user, user_loss        clips by user instead of by example
    private_quantile                a bound that follows the norms privately
    error_feedback                  adds back what the clip cut off

For gradients of examples that you already have, such as those of `vmap(grad(loss))`:

    per_example_global_norm_clip
    per_example_layer_norm_clip
    per_example_normalize
"""

from optaxclip.per_example.clipped_grad import clipped_value_and_grad, ghost_parameters
from optaxclip.per_example.examples import ClippedExamples
from optaxclip.per_example.factors import auto_s, psac
from optaxclip.per_example.feedback import FeedbackState, error_feedback
from optaxclip.per_example.private_quantile import (
    PrivateQuantile,
    QuantileState,
    private_quantile,
)
from optaxclip.per_example.transforms import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
    per_example_normalize,
)
from optaxclip.per_example.users import group_by_user, user_loss

__all__ = [
    "ClippedExamples",
    "FeedbackState",
    "PrivateQuantile",
    "QuantileState",
    "auto_s",
    "clipped_value_and_grad",
    "error_feedback",
    "ghost_parameters",
    "group_by_user",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "per_example_normalize",
    "private_quantile",
    "psac",
    "user_loss",
]
