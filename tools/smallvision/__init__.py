"""Several projects by one name: ``pip install "smallvision[gfnet_dynn,mpkd] @ git+ADDRESS"``."""
