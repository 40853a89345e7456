"""How to use a finished model."""
