"""The networks: GFNet, its pyramids, GFNet with exits."""

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import EarlyExit, ExitOutputs, GFNetDynn
from gfnet_dynn.models.gfnet_pyramid import GFNetPyramid

__all__ = ["EarlyExit", "ExitOutputs", "GFNet", "GFNetDynn", "GFNetPyramid", "build_gfnet"]
