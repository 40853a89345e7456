"""RandAugment and its image operations on RGB uint8 ``(H, W, 3)``, with timm's policy strings.

Source: Cubuk et al. 2020, arXiv:1909.13719; the string format, the list of operations and their
ranges follow timm's ``rand-...`` policies. Geometric operations are bilinear and fill with grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from shared_core.datasets.reading.image_headers import Pixels

Levels = npt.NDArray[np.floating]
FILL = (128, 128, 128)
TOP_LEVEL = 10.0  # magnitudes are fractions of this


def autocontrast(image: Pixels) -> Pixels:
    """Stretch each channel to 0..255; a constant channel stays."""
    low, high = image.min(axis=(0, 1)).astype(np.float64), image.max(axis=(0, 1)).astype(np.float64)
    scale = np.where(high > low, 255.0 / np.maximum(high - low, 1.0), 1.0)
    shift = np.where(high > low, -low * scale, 0.0)
    levels = np.arange(256.0)[:, None] * scale + shift
    return _lookup(image, np.clip(levels, 0, 255))


def equalize(image: Pixels) -> Pixels:
    """Equalize the histogram of each channel (the integer rule of Pillow)."""
    table = np.empty((256, 3))
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        used = counts[counts > 0]
        step = (int(used.sum()) - int(used[-1])) // 255
        if len(used) <= 1 or step == 0:
            table[:, channel] = np.arange(256)
        else:
            before = np.concatenate([[0], np.cumsum(counts)[:-1]])
            table[:, channel] = np.minimum((step // 2 + before) // step, 255)
    return _lookup(image, table)


def invert(image: Pixels) -> Pixels:
    """255 minus the image."""
    return np.subtract(255, image, dtype=np.uint8)


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keep the highest ``bits`` (0 to 8) of each sample."""
    return image & np.uint8((0xFF << (8 - bits)) & 0xFF)


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Invert the samples that are at least ``threshold`` (0 to 256)."""
    levels = np.arange(256.0)
    return _lookup(image, np.where(levels < threshold, levels, 255 - levels)[:, None])


def solarize_add(image: Pixels, amount: int, threshold: int = 128) -> Pixels:
    """Add ``amount`` to the samples below ``threshold``."""
    levels = np.arange(256.0)
    return _lookup(
        image, np.where(levels < threshold, np.minimum(levels + amount, 255), levels)[:, None]
    )


def adjust_color(image: Pixels, factor: float) -> Pixels:
    """Blend with the grey version: 0 is grey, 1 the image, above 1 more saturated."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _pixels(cv2.addWeighted(image, factor, grey, 1.0 - factor, 0.0))


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Blend with the mean grey level: 0 is flat, 1 the image."""
    mean = math.floor(float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()) + 0.5)
    levels = np.arange(256.0) * factor + mean * (1.0 - factor)
    return _lookup(image, np.clip(levels, 0, 255)[:, None])


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Multiply by ``factor``, clipped."""
    return _lookup(image, np.clip(np.arange(256.0) * factor, 0, 255)[:, None])


def adjust_sharpness(image: Pixels, factor: float) -> Pixels:
    """Blend with a 3 x 3 smoothed version (centre weight 5 of 13); the border stays."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
    smooth = cv2.filter2D(image, -1, kernel)
    smooth[[0, -1]] = image[[0, -1]]
    smooth[:, [0, -1]] = image[:, [0, -1]]
    return _pixels(cv2.addWeighted(image, factor, smooth, 1.0 - factor, 0.0))


def adjust_hue(image: Pixels, turn: float) -> Pixels:
    """Turn the hue by ``turn`` of a full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return _pixels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def rotate(image: Pixels, degrees: float) -> Pixels:
    """Rotate counter-clockwise about the centre, same size."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return _warp(image, np.asarray(matrix, dtype=np.float64))


def shear_x(image: Pixels, factor: float) -> Pixels:
    """Each row moves left by ``factor`` times its number."""
    return _warp(image, np.array([[1.0, -factor, 0.0], [0.0, 1.0, 0.0]]))


def shear_y(image: Pixels, factor: float) -> Pixels:
    """Each column moves up by ``factor`` times its number."""
    return _warp(image, np.array([[1.0, 0.0, 0.0], [-factor, 1.0, 0.0]]))


def translate_x(image: Pixels, fraction: float) -> Pixels:
    """Move left by ``fraction`` of the width."""
    return _warp(image, np.array([[1.0, 0.0, -fraction * image.shape[1]], [0.0, 1.0, 0.0]]))


def translate_y(image: Pixels, fraction: float) -> Pixels:
    """Move up by ``fraction`` of the height."""
    return _warp(image, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, -fraction * image.shape[0]]]))


# name -> (function of image and signed strength, signed, strength from the level in [0, 1])
_Operation = tuple[Callable[[Pixels, float], Pixels], bool, Callable[[float], float]]


def _operations(increasing: bool) -> dict[str, _Operation]:
    """The fifteen operations; ``increasing``: a higher level always means a stronger change."""

    def enhance(level: float) -> float:
        return level * 0.9 if increasing else level * 1.8 + 0.1 - 1.0

    def blend(function: Callable[[Pixels, float], Pixels]) -> _Operation:
        return (lambda image, s: function(image, max(0.1, 1.0 + s))), increasing, enhance

    def bits(level: float) -> float:
        return 4 - int(level * 4) if increasing else int(level * 4)

    def threshold(level: float) -> float:
        return 256 - min(256, int(level * 256)) if increasing else min(256, int(level * 256))

    def nothing(level: float) -> float:
        return 0.0

    return {
        "AutoContrast": (lambda image, s: autocontrast(image), False, nothing),
        "Equalize": (lambda image, s: equalize(image), False, nothing),
        "Invert": (lambda image, s: invert(image), False, nothing),
        "Rotate": (rotate, True, lambda level: level * 30.0),
        "Posterize": (lambda image, s: posterize(image, int(s)), False, bits),
        "Solarize": (lambda image, s: solarize(image, int(s)), False, threshold),
        "SolarizeAdd": (
            lambda image, s: solarize_add(image, int(s)),
            False,
            lambda level: min(128, int(level * 110)),
        ),
        "Color": blend(adjust_color),
        "Contrast": blend(adjust_contrast),
        "Brightness": blend(adjust_brightness),
        "Sharpness": blend(adjust_sharpness),
        "ShearX": (shear_x, True, lambda level: level * 0.3),
        "ShearY": (shear_y, True, lambda level: level * 0.3),
        "TranslateXRel": (translate_x, True, lambda level: level * 0.45),
        "TranslateYRel": (translate_y, True, lambda level: level * 0.45),
    }


class RandAugment:
    """A RandAugment policy from a string such as ``rand-m9-mstd0.5-inc1``.

    The parts after ``rand``, in any order: ``m`` magnitude (0 to 10, default 10), ``n`` operations
    an image (default 2), ``mstd`` standard deviation of the magnitude (default 0; 100 or more:
    uniform between 0 and the magnitude), ``mmax`` highest magnitude (default 10), ``p`` probability
    of each operation (default 0.5), ``inc`` 1 for increasing severity (default 0).

    Raises:
        ValueError: a part that is not known, or a value out of range.
    """

    def __init__(self, policy: str) -> None:
        parts = policy.split("-")
        if parts[0] != "rand":
            raise ValueError(
                f"augmentation policy {policy!r}, expected rand-m9-mstd0.5-inc1 or such"
            )
        values = {"m": TOP_LEVEL, "n": 2.0, "mstd": 0.0, "mmax": TOP_LEVEL, "p": 0.5, "inc": 0.0}
        for part in parts[1:]:
            name = part.rstrip("0123456789.")
            try:
                number = (
                    math.inf if (name, part) == ("mstdinf", "mstdinf") else float(part[len(name) :])
                )
            except ValueError:
                number = math.nan
            name = "mstd" if name == "mstdinf" else name
            if name not in values or math.isnan(number):
                raise ValueError(
                    f"part {part!r} of the policy {policy!r}, expected one of {', '.join(values)}"
                    " followed by a number"
                )
            values[name] = number
        if not 0 <= values["m"] <= values["mmax"] or not 0 < values["mmax"] <= TOP_LEVEL:
            raise ValueError(f"policy {policy!r}: expected 0 <= m <= mmax <= {TOP_LEVEL:g}")
        if not 0 <= values["p"] <= 1 or values["n"] != int(values["n"]):
            raise ValueError(f"policy {policy!r}: expected p in [0, 1] and a whole n")
        self.policy = policy
        self.magnitude, self.magnitude_std = values["m"], values["mstd"]
        self.top_magnitude, self.probability = values["mmax"], values["p"]
        self.layers = int(values["n"])
        self._operations = _operations(values["inc"] != 0)
        self._names = tuple(self._operations)

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
        """Choose the operations of one image: (name, signed strength), those that apply only."""
        chosen: list[tuple[str, float]] = []
        for _ in range(self.layers):
            # Four draws a layer whatever comes of them, so that views stay comparable.
            pick, apply, sign = rng.random(3).tolist()
            deviation = float(rng.standard_normal())
            if self.magnitude_std >= 100:
                magnitude = float(rng.random()) * self.magnitude
            else:
                magnitude = self.magnitude + deviation * self.magnitude_std
            level = min(max(magnitude, 0.0), self.top_magnitude) / TOP_LEVEL
            name = self._names[int(pick * len(self._names))]
            _function, signed, strength = self._operations[name]
            if apply < self.probability:
                chosen.append((name, strength(level) * (-1 if signed and sign < 0.5 else 1)))
        return chosen

    def apply(self, image: Pixels, name: str, strength: float) -> Pixels:
        """Apply one operation by name at its signed strength (degrees, fraction, bits ...)."""
        return self._operations[name][0](image, strength)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """Augment one image, uint8 ``(H, W, 3)``; the argument is not written to."""
        for name, strength in self.draw(rng):
            image = self.apply(image, name, strength)
        return image


def _lookup(image: Pixels, levels: Levels) -> Pixels:
    """Apply a table of float levels, (256, 1) or (256, 3), rounded to the nearest."""
    table = np.floor(levels + 0.5).astype(np.uint8)
    table = np.broadcast_to(table, (256, 3)).reshape(1, 256, 3)
    return _pixels(cv2.LUT(image, np.ascontiguousarray(table)))


def _warp(image: Pixels, matrix: Levels) -> Pixels:
    size = (image.shape[1], image.shape[0])
    return _pixels(cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=FILL))


def _pixels(result: npt.ArrayLike) -> Pixels:
    """What OpenCV returns, with the type it has."""
    return np.asarray(result, dtype=np.uint8)
