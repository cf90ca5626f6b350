"""What happens in a run: seen in the state, said in words, and judged over a window."""
