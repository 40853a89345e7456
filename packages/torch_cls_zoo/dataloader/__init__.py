"""Data: folders, letterboxed views, augmentation, batch mixing, knowledge and curriculum files."""
