"""The view of one image: augmentation of the whole picture, then the letterbox."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from shared_core.datasets.views.augment import Plan
from shared_core.datasets.views.geometry import letterbox_box
from torch_cls_zoo.dataloader.preprocess import FILL, METHOD, preprocess


class Augment(Protocol):
    """Changes one image; every random number comes from ``rng``."""

    name: str

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)`` in and out; the input is not written to."""


class LetterboxView:
    """What training or evaluation sees of an image; decided by (seed, image key, view number).

    Args:
        size: height and width of the result in pixels, any.
        augment: applied to the whole image first; None for evaluation.
        seed: of all views.
        dct_scaled: let a JPEG be decoded at 1/2, 1/4 or 1/8 where that is still as large as its
            place in the letterbox. Off with ``augment``: its strengths are in pixels of the file.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        augment: Augment | None = None,
        seed: int = 0,
        dct_scaled: bool | None = None,
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"image size is {size[0]} x {size[1]}, expected at least 1 x 1")
        self.size = (int(size[0]), int(size[1]))
        self.augment, self.seed = augment, seed
        self.dct_scaled = augment is None if dct_scaled is None else dct_scaled

    def plan(self, rng: np.random.Generator, height: int, width: int) -> Plan:
        """The geometry: the whole image goes to its place in the letterbox."""
        inside = letterbox_box((height, width), self.size)
        return Plan((0, 0, height, width), (inside[2], inside[3]), None, False, False)

    def finish(
        self, image: np.ndarray, plan: Plan, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(height, width, 3)``."""
        if self.augment is not None:
            image = self.augment(image, rng)
        preprocess(image, self.size, out=out)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "letterbox",
            "size": list(self.size),
            "augment": None if self.augment is None else self.augment.name,
            "fill": FILL,
            "method": METHOD,
            "seed": self.seed,
            "dct_scaled": self.dct_scaled,
        }
