"""A trained student on images: one, a folder, lines of paths, HTTP."""
