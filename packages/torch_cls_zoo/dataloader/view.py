"""The view of a training image: augmentation of the whole picture, then the letterbox.

Evaluation and use take the core's ``LetterboxView`` as it is: the whole image, centred on black.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from shared_core.datasets.views.augment import Plan, place, random_resized_crop_box
from shared_core.datasets.views.evaluation import LetterboxView


class Augment(Protocol):
    """Changes one image; every random number comes from ``rng``."""

    name: str

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)`` in and out; the input is not written to."""


class AugmentedView(LetterboxView):
    """What training sees of an image; decided by (seed, image key, view number).

    The whole file is decoded: the augmentation's strengths are in pixels of the file.

    Args:
        size: height and width of the result in pixels, any.
        augment: applied to the whole image first.
        seed: of all views.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: tuple[int, int], *, augment: Augment, seed: int = 0) -> None:
        super().__init__(size, dct_scaled=False)
        self.augment, self.seed = augment, seed

    def finish(
        self, image: np.ndarray, plan: Plan, rng: np.random.Generator | None, out: np.ndarray
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(height, width, 3)``."""
        if rng is None:
            raise ValueError("an augmented view needs a generator of random numbers")
        super().finish(self.augment(image, rng), plan, rng, out)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {**super().settings(), "augment": self.augment.name, "seed": self.seed}


class CropView(LetterboxView):
    """A random window of what evaluation sees, resized to the whole, and perhaps mirrored.

    The picture is letterboxed larger first, so that the smallest window has the result's pixels
    and margins look as they do in evaluation.

    Args:
        size: height and width of the result in pixels, any.
        least: the smallest window's share of the picture, above 0.
        flip: probability of a mirrored picture.
        augment: applied to the whole image first, or None.
        seed: of all views.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        least: float,
        flip: float,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(size, dct_scaled=augment is None)
        larger = 1 / math.sqrt(least)
        self.whole = LetterboxView(
            (math.ceil(size[0] * larger), math.ceil(size[1] * larger)), dct_scaled=augment is None
        )
        self.least, self.flip, self.augment, self.seed = least, flip, augment, seed

    def plan(self, rng: np.random.Generator | None, height: int, width: int) -> Plan:
        """The whole image goes to its place in the larger letterbox."""
        return self.whole.plan(rng, height, width)

    def finish(
        self, image: np.ndarray, plan: Plan, rng: np.random.Generator | None, out: np.ndarray
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(height, width, 3)``."""
        if rng is None:
            raise ValueError("a random window needs a generator of random numbers")
        if self.augment is not None:
            image = self.augment(image, rng)
        rows, columns = self.whole.size
        canvas = np.empty((rows, columns, 3), np.uint8)
        self.whole.finish(image, plan, rng, canvas)
        box = random_resized_crop_box(
            rng, rows, columns, scale=(self.least, 1.0), ratio=(3 / 4, 4 / 3)
        )
        window = Plan(box, self.size, None, bool(rng.random() < self.flip), False)
        place(canvas, window, "area", out)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        name = None if self.augment is None else self.augment.name
        more = {"least": self.least, "flip": self.flip, "augment": name, "seed": self.seed}
        return {**super().settings(), "view": "letterbox window", **more}
