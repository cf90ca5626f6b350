"""What happened in a run: metrics, watches, recorded histories, and what they say in words."""
