"""Lints chains: reads a chain as a list of nodes and applies one rule per mistake to them."""
