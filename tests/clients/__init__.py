"""Trainings of projects that nobody here wrote, with these clips: `python -m tests.clients`."""
