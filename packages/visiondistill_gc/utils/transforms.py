"""What training and evaluation see of an image: the README's augmentations, replayable by seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from shared_core.datasets import EvalView
from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.views.augment import Plan, place
from shared_core.datasets.views.random_ops import (
    color_jitter,
    random_erasing,
    random_resized_crop_box,
)

BLACK = (0.0, 0.0, 0.0)
NOTHING = (0.0, 0.0, 0.0)


def eval_view(input_size: int, *, method: str = "linear") -> EvalView:
    """The whole image squeezed to a square, as the original does (aspect ratio not kept).

    Pixels are the same from files and from a cache of whole images. Normalise them with
    ``shared_core.for_paddle.data.Normalizer(mean, std)``, both from the model file.

    Args:
        input_size: side of the result, pixels.
        method: of the resize, see ``shared_core.datasets.views.geometry``.
    """
    return EvalView(input_size, resize_ratio=None, method=method, dct_scaled=False)


class GarbageView:
    """Squeeze to a square, mirror, turn, shift, recolour, erase: the training view.

    The order is the original's. A view is decided by (seed, image key, view number) alone, so it
    can be replayed in any thread, order or process.

    Args:
        size: side of the result, pixels.
        hflip, vflip: probabilities.
        rotation: degrees; the angle is uniform in ``[-rotation, rotation]``, corners become black.
        padding: pixels of black around the turned image before a crop back to ``size``.
        jitter: brightness, contrast, saturation, hue.
        erasing: probability that a rectangle of 2 to 33 % of the image becomes black.
        crop_scale: area of a random crop before the squeeze, as a fraction; (1, 1) for none, as
            in the original.
        seed: of all views.
        method: of the resize.

    Raises:
        ValueError: a value out of range.
    """

    dct_scaled = False

    def __init__(
        self,
        size: int,
        *,
        hflip: float = 0.5,
        vflip: float = 0.3,
        rotation: float = 30.0,
        padding: int = 8,
        jitter: Sequence[float] = (0.3, 0.3, 0.3, 0.1),
        erasing: float = 0.2,
        crop_scale: Sequence[float] = (1.0, 1.0),
        seed: int = 0,
        method: str = "linear",
    ) -> None:
        for name, value in (("hflip", hflip), ("vflip", vflip), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a probability in [0, 1]")
        if not 0 <= rotation <= 180:
            raise ValueError(f"rotation is {rotation}, expected 0 to 180 degrees")
        if padding < 0 or len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(
                f"padding is {padding}, jitter {tuple(jitter)}, expected at least 0, four numbers, "
                "the hue at most 0.5"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop scale is {tuple(crop_scale)}, expected 0 < low <= high <= 1")
        self.size = (size, size)
        self.hflip, self.vflip, self.rotation, self.padding = hflip, vflip, rotation, padding
        self.jitter, self.erasing = tuple(float(j) for j in jitter), erasing
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.seed, self.method = seed, method

    def plan(self, rng: np.random.Generator, height: int, width: int) -> Plan:
        """Draw the crop and the flips; the rest is drawn in ``finish``."""
        box = (0, 0, height, width)
        if self.crop_scale != (1.0, 1.0):
            box = random_resized_crop_box(rng, height, width, scale=self.crop_scale)
        across, down = rng.random(2).tolist()
        return Plan(box, self.size, None, across < self.hflip, down < self.vflip)

    def finish(self, image: Pixels, plan: Plan, rng: np.random.Generator, out: Pixels) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(size, size, 3)``."""
        place(image, plan, self.method, out)
        turn, down, right = rng.random(3).tolist()
        if self.rotation > 0:
            out[...] = rotated(out, (2 * turn - 1) * self.rotation)
        if self.padding > 0:
            steps = 2 * self.padding + 1
            shift(out, int(down * steps) - self.padding, int(right * steps) - self.padding)
        if any(self.jitter):
            b, c, s, h = self.jitter
            out[...] = color_jitter(out, rng, brightness=b, contrast=c, saturation=s, hue=h)
        if self.erasing > 0:
            random_erasing(
                out, rng, probability=self.erasing, mode="const", mean=BLACK, std=NOTHING
            )

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """The view of a whole upright image, uint8 ``(H, W, 3)``."""
        out = np.empty((*self.size, 3), np.uint8)
        self.finish(image, self.plan(rng, image.shape[0], image.shape[1]), rng, out)
        return out

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "garbage",
            "size": list(self.size),
            "hflip": self.hflip,
            "vflip": self.vflip,
            "rotation": self.rotation,
            "padding": self.padding,
            "jitter": list(self.jitter),
            "erasing": self.erasing,
            "crop_scale": list(self.crop_scale),
            "seed": self.seed,
            "method": self.method,
        }


def rotated(image: Pixels, degrees: float) -> Pixels:
    """Turned counter-clockwise about the centre, same size, bilinear, black corners."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return np.asarray(
        cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR), dtype=np.uint8
    )


def shift(image: Pixels, down: int, right: int) -> None:
    """Pad with black and crop back, in place: row ``r`` becomes what row ``r + down`` was."""
    height, width = image.shape[:2]
    source = image.copy()
    image[...] = 0
    rows, columns = height - abs(down), width - abs(right)
    if rows > 0 and columns > 0:
        top, left = max(0, -down), max(0, -right)
        cut = source[max(0, down) : max(0, down) + rows, max(0, right) : max(0, right) + columns]
        image[top : top + rows, left : left + columns] = cut
