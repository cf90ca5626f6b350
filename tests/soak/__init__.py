"""Random clips, made of parts, on random gradients: each is held to the laws of all clips.

    uv run python -m tests.soak [--minutes 30] [--seed 0]

Prints how many compositions were run. Of one that breaks a law it prints the parts, made as small
as possible, and exits with 1. Not collected by pytest: it runs for as long as one likes.

To compile a program takes a second, and so most compositions run op by op: the operations are those
of a few shapes, each compiled once. About one in thirty runs as one program, on one device or on a
mesh of eight.
"""
