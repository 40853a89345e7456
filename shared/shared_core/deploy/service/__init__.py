"""The HTTP service of a finished model: what a request may bring, batches, answers, the page."""
