"""The networks: GFNet, its pyramids, GFNet with exits, and who may leave where."""
