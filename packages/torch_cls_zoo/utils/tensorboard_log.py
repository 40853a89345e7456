"""TensorBoard's event files: scalars, histograms, the confusion matrix, sample predictions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from shared_core.datasets import ImageSet
from shared_core.datasets.views.evaluation import LetterboxView
from torch_cls_zoo.utils.pictures import BAD, GOOD, captioned_sheet, confusion_picture

if TYPE_CHECKING:
    from torch_cls_zoo.applications.test import Outputs

SHOWN = 12  # sample predictions on a sheet
NORMS = (nn.modules.batchnorm._BatchNorm,)


class TensorBoardLog:
    """Writes events below ``folder``; does nothing when disabled or TensorBoard is not installed.

    Args:
        folder: of the event files.
        enabled: only the main process writes.
        first_step: events of this step and later ones, from before a stop, are taken back.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, first_step: int = 0) -> None:
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("note: tensorboard is not installed, no event files are written", file=sys.stderr)
            return
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def gammas(self, model: nn.Module, step: int) -> None:
        """The scales of all batch norms together; nothing when there are none."""
        if self._writer is None:
            return
        scales = [
            module.weight.detach().float().flatten().cpu().numpy()
            for module in model.modules()
            if isinstance(module, NORMS) and module.weight is not None
        ]
        if scales:
            self._writer.add_histogram("BN gamma", np.concatenate(scales), step)

    def confusion(
        self, confusion: Sequence[Sequence[int]], classes: Sequence[str], step: int
    ) -> None:
        """The confusion matrix as a picture."""
        if self._writer is None:
            return
        try:
            picture = confusion_picture(confusion, classes)
        except ImportError:  # without matplotlib everything else still works
            return
        self._writer.add_image("Val/Confusion", picture, step, dataformats="HWC")

    def predictions(
        self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int], step: int
    ) -> None:
        """Some images, evenly spread over the part, with true and predicted class."""
        if self._writer is None:
            return
        rows = np.unique(np.linspace(0, len(outputs.rows) - 1, SHOWN).round().astype(int))
        sheet = prediction_sheet(outputs, rows.tolist(), classes, size)
        self._writer.add_image("Val/Predictions", sheet, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def prediction_sheet(
    outputs: Outputs, rows: Sequence[int], classes: Sequence[str], size: tuple[int, int]
) -> np.ndarray:
    """Images of these rows with their true and predicted classes; green is right, red is wrong."""
    images: ImageSet = outputs.part.images
    guesses, view = outputs.logits.argmax(axis=1), LetterboxView(size)
    pictures, captions, colors = [], [], []
    for row in rows:
        pictures.append(view(images.image(int(outputs.rows[row]))))
        true, guess = int(outputs.labels[row]), int(guesses[row])
        captions.append([f"is {classes[true]}", f"said {classes[guess]}"])
        colors.append(GOOD if true == guess else BAD)
    return captioned_sheet(pictures, captions, colors=colors)
