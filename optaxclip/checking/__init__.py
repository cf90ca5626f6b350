"""What goes wrong silently in a chain: its parts read off, and a rule for each mistake."""
