"""How to use a finished model: the demo of the first README."""
