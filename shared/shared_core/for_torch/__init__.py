"""The PyTorch side of the shared core; import its modules by name, nothing is imported here."""
