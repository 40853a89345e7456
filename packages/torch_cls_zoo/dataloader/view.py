"""The view of a training image: the picture augmented, letterboxed, turned, cut, mirrored, erased.

Evaluation and use take the core's ``LetterboxView`` as it is: the whole image, centred on black.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from shared_core.datasets.views.augment import Plan, place, random_erasing, random_resized_crop_box
from shared_core.datasets.views.evaluation import LetterboxView


class Augment(Protocol):
    """Changes one image; every random number comes from ``rng``."""

    name: str

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)`` in and out; the input is not written to."""


class CropView(LetterboxView):
    """A random window of what evaluation sees, resized to the whole; decided by (seed, key, view).

    The picture is letterboxed larger first, so that the smallest window has the result's pixels
    and margins look as they do in evaluation. With an augmentation the whole file is decoded: its
    strengths are in pixels of the file.

    Args:
        size: height and width of the result in pixels, any.
        least: the smallest window's share of the picture, above 0; 1 shows all of it.
        flip: probability of a mirrored picture.
        quarter_turns: turn the picture by 0, 1, 2 or 3 right angles, each as often.
        erasing: probability that noise covers a rectangle of 2 % to a third of the result.
        augment: applied to the whole image first, or None.
        seed: of all views.

    Raises:
        ValueError: a size below 1, or quarter turns of a view that is no square.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        least: float = 1.0,
        flip: float = 0.0,
        quarter_turns: bool = False,
        erasing: float = 0.0,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(size, dct_scaled=augment is None)
        if quarter_turns and size[0] != size[1]:
            raise ValueError(
                f"--quarter_turns: the input has {size[0]} x {size[1]} pixels, expected a square"
            )
        larger = 1 / math.sqrt(least)
        self.whole = LetterboxView(
            (math.ceil(size[0] * larger), math.ceil(size[1] * larger)), dct_scaled=augment is None
        )
        self.least, self.flip, self.augment, self.seed = least, flip, augment, seed
        self.quarter_turns, self.erasing = quarter_turns, erasing

    def plan(self, rng: np.random.Generator | None, height: int, width: int) -> Plan:
        """The whole image goes to its place in the larger letterbox."""
        return self.whole.plan(rng, height, width)

    def finish(
        self, image: np.ndarray, plan: Plan, rng: np.random.Generator | None, out: np.ndarray
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(height, width, 3)``."""
        if rng is None:
            raise ValueError("a view of training needs a generator of random numbers")
        if self.augment is not None:
            image = self.augment(image, rng)
        rows, columns = self.whole.size
        canvas = np.empty((rows, columns, 3), np.uint8)
        self.whole.finish(image, plan, rng, canvas)
        if self.quarter_turns:
            canvas = np.ascontiguousarray(np.rot90(canvas, int(rng.integers(4))))
        box = random_resized_crop_box(
            rng, rows, columns, scale=(self.least, 1.0), ratio=(3 / 4, 4 / 3)
        )
        if self.least == 1:
            box = (0, 0, rows, columns)
        window = Plan(box, self.size, None, bool(rng.random() < self.flip), False)
        place(canvas, window, "area", out)
        if self.erasing:
            random_erasing(out, rng, probability=self.erasing)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            **super().settings(),
            "view": "letterbox window",
            "least": self.least,
            "flip": self.flip,
            "quarter_turns": self.quarter_turns,
            "erasing": self.erasing,
            "augment": None if self.augment is None else self.augment.name,
            "seed": self.seed,
        }
