"""Landmarks: Swin-base into small students through one frozen head; open-set verification."""

__version__ = "0.1.0"
