"""The frozen classifier of teacher and student, and exact losses through it."""
