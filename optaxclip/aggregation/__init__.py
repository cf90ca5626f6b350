"""Means over clients of which some may be wrong: each clips its own gradient, then they meet.

    clipped_mean      the mean of clipped gradients: clip by norm or by value before the all-reduce
    centered_clip     what is clipped is the distance to the last mean: for attackers
    clip21_sgd2m      what is clipped is the distance to what the client has sent: for private
                      clients whose data differ

A client is a device along a mesh axis (`shard_map`, `pmap`), or a row of `vmap(axis_name=...)`.
"""

from optaxclip.aggregation.centered import centered_clip
from optaxclip.aggregation.clients import AggregateState, ClientState
from optaxclip.aggregation.clip21 import clip21_sgd2m
from optaxclip.aggregation.mean import clipped_mean

__all__ = ["AggregateState", "ClientState", "centered_clip", "clip21_sgd2m", "clipped_mean"]
