"""Losses that weigh samples and classes: weighted, threshold, OHM and GHM-C, softmax or sigmoid."""

from torch_cls_zoo.criterions.build import FAMILIES, NAMES, Criterion, build_criterion
from torch_cls_zoo.criterions.matrices import Matrices, load_matrices

__all__ = ["FAMILIES", "NAMES", "Criterion", "Matrices", "build_criterion", "load_matrices"]
