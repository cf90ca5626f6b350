"""Linting chains: each is read as a list of nodes, to which one rule per mistake is applied."""
