"""How to use a finished model: the demo, and what it opens that the core does not know."""
