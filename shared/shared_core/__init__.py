"""What the five projects share: datasets, metrics, checkpoints, teacher knowledge, run records."""

__version__ = "0.1.0"
