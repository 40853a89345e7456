"""Garbage classification in Paddle: ResNet50 taught into MobileNetV2, K-fold, Mixup, VisualDL."""
