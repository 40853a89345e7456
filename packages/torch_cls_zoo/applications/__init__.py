"""What the command does: train, evaluate, write knowledge, make a curriculum, draw, convert."""
