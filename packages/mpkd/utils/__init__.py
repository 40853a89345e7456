"""Small tools: configuration, logging, seeds, checkpoints."""
