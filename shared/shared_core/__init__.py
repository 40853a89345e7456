"""What the five projects share: datasets, metrics, checkpoints, teacher knowledge, run records."""
