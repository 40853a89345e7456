"""Networks of torchvision and timm under one name each; none is written by hand."""

from torch_cls_zoo.models.aliases import ALIASES, list_archs, resolve
from torch_cls_zoo.models.build import Built, build_model
from torch_cls_zoo.models.head import head_names

__all__ = ["ALIASES", "Built", "build_model", "head_names", "list_archs", "resolve"]
