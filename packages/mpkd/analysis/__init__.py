"""What runs left, as curves, tables and one page."""
