"""Augmentation of one image: MyAugment, AutoAugment's policies, and a sheet to look at them."""
