"""Random clips, made of parts, on random gradients: each is held to the laws of all clips.

    uv run python -m tests.soak [--minutes 30] [--seed 0]

Prints how many compositions were run, and of how many clips. Of one that breaks a law it prints the
parts, and the plainest ones that break it as well, and exits with 1. It runs for as long as one
likes; `tests/test_soak.py` runs a dozen.

To compile a program takes a second. So most compositions run op by op: the operations are those of
a few shapes, each compiled once, and a threshold is compiled once for each shape of norms. Of a
thousand, 30 run under a `vmap` with a name, and 40 as one program, on one device or on a mesh of
eight.
"""
