"""What a finished model is worth: real exits, measured times, on images that chose nothing."""
