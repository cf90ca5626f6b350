"""One file per paper: a docstring and a composition of parts."""
