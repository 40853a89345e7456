"""The view of a training image: augmentation of the whole picture, then the letterbox.

Evaluation and use take the core's ``LetterboxView`` as it is: the whole image, centred on black.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from shared_core.datasets.views.augment import Plan
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
