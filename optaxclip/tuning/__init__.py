"""What the threshold should be: from the norms of a short run, or from a sweep over values and seeds."""

from optaxclip.tuning.training import objective

__all__ = ["objective"]
