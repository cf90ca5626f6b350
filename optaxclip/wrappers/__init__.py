"""What must hold the optimizer: wrappers that skip or reset whole optimizer steps."""
