"""Gradients of single examples, weighted and summed: all of them at once, a few at a time, or never formed at all."""
