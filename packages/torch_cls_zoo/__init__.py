"""An image-classification zoo: many nets, hard-example losses, knowledge files, curriculum, CAM."""

__version__ = "0.1.0"
