"""Named clips: one file a method, a docstring and a few lines over the parts."""
