"""The images: CIFAR-10, ImageNet, folders, built-in data; their cache, their views."""
