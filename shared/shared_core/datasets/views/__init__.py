"""What a network is shown of an image: resizing, crops, augmentation, mixing."""
