"""From files to batches: headers, decoding, caches, the order of an epoch, the loader."""
