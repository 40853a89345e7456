"""Who leaves where: thresholds, promises, exits worth keeping, from the stored outputs of exits."""
