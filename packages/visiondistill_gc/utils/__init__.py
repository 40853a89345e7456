"""Data, losses, training and model files: one idea a file."""
