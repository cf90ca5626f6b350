"""One file a paper: a docstring and a composition of parts."""
