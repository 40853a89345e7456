"""From a finished model to its users: what only Paddle can write and open."""
