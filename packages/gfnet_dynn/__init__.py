"""Remote-sensing scenes: GFNet, distilled, with learned early exits."""

__version__ = "0.1.0"
