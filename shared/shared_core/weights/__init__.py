"""Trained networks to start from: which there are, where to find them, how to read them safely."""
