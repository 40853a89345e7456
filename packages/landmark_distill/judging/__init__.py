"""The open-set test: verification over all pairs, retrieval, and pictures of both."""
