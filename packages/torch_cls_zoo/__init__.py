"""An image-classification zoo: many nets, hard-example losses, knowledge files, curriculum, CAM."""
