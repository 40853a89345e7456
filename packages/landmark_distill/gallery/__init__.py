"""Features of many images: made by a finished network, kept on disk, searched."""
