"""Quantization: fake quantisers, reconstruction, and the search for bit-widths."""
