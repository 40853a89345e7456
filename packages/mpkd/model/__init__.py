"""The networks: teacher, student, and low-rank adapters for either."""
