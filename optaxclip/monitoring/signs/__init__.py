"""One rule for each sign: what a recorded run shows, the numbers, and what to try.

Each rule is a function of a run that yields what it finds. They are in the order in which causes
come before their consequences; a sign that another one explains is not said.
"""
