"""Landmarks: Swin-base into small students through one frozen head; open-set verification."""
