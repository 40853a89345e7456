"""Which images a run has, what is true of them, and what a network sees of them."""
