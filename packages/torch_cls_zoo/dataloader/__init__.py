"""Images on their way into a network: folders, letterboxed views, augmentation, mixing, and the
files that say something of each image (knowledge, curriculum).

What belongs here turns files into batches; nothing here knows of networks or runs.
"""

PARTS = ("train", "val", "test")
POLICIES = ("my", "imagenet", "cifar10", "svhn", "rand")  # of augmentation
