"""Optimisers of torch and timm with one rule of weight decay, and the warm-up schedule."""

from torch_cls_zoo.optim.build import OPTIMIZERS, build_optimizer
from torch_cls_zoo.optim.schedule import (
    PiecewiseSchedule,
    Schedule,
    build_schedule,
    piecewise_factor,
)

__all__ = [
    "OPTIMIZERS",
    "PiecewiseSchedule",
    "Schedule",
    "build_optimizer",
    "build_schedule",
    "piecewise_factor",
]
