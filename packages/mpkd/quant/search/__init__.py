"""The search for bit-widths under a budget."""
