"""Means over clients, some of which may be wrong: each client clips before the all-reduce.

    clipped_mean      clips the gradient of each client, by norm or by value
    centered_clip     clips the distance to the last mean: for attackers
    clip21_sgd2m      clips the distance to what the client has sent: for private clients whose
                      data differ

A client is a device along a mesh axis (`shard_map`, `pmap`), or a row of `vmap(axis_name=...)`.
"""

from optaxclip.aggregation.centered import centered_clip
from optaxclip.aggregation.clients import AggregateState, ClientState
from optaxclip.aggregation.clip21 import clip21_sgd2m
from optaxclip.aggregation.mean import clipped_mean

__all__ = ["AggregateState", "ClientState", "centered_clip", "clip21_sgd2m", "clipped_mean"]
