"""Sweeps: the matrix of precision x distillation, the papers' claims tried small, their recipes."""
