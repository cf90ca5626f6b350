"""How long a block may be: thresholds are optax transformations of norms into bounds."""
