"""What happened in a run: metrics, watches, recorded histories, and explanations in words."""

from optaxclip.monitoring.bad import BadStep, Episode, bad_steps

__all__ = ["BadStep", "Episode", "bad_steps"]
