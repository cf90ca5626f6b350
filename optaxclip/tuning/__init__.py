"""Choosing a threshold: from the norms of a short run, or by a sweep over values and seeds."""

from optaxclip.tuning.recommend import recommend
from optaxclip.tuning.recommendation import Reason, Recommendation
from optaxclip.tuning.sweep import Choice, Sweep
from optaxclip.tuning.training import objective, tune

__all__ = ["Choice", "Reason", "Recommendation", "Sweep", "objective", "recommend", "tune"]
