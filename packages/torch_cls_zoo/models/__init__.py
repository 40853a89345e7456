"""Networks by name: older names, heads for the user's classes, weights to start from, summaries.

What belongs here makes or describes a network; nothing here knows of images or runs.
"""

from torch_cls_zoo.models.aliases import ALIASES, resolve
from torch_cls_zoo.models.build import Built, build_model

__all__ = ["ALIASES", "Built", "build_model", "resolve"]
