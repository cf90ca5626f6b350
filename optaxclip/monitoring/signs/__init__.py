"""Rules that find the signs in a recorded run: what it shows, the numbers, and what to try.

Each rule is a function of a run that yields the signs it finds. `diagnose` runs them in an order in
which causes come before their consequences, and leaves out signs that another one explains.
"""
