"""The networks: a teacher of any architecture that Paddle has, and the small student."""
