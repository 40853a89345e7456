"""MyAugment: four groups in random order, the last of them up to three of eight filters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torch_cls_zoo.dataloader.enhancement import pixel_ops as ops

Op = Callable[[np.ndarray, np.random.Generator], np.ndarray]
TOP_PROBABILITY = 0.5  # of mirroring, cropping and rotating, each
FILTER_PROBABILITY = 0.8  # of each filter that was chosen
MOST_FILTERS = 3


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror."""
    return ops.mirror(image)


def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut up to 10 % from each side and scale back."""
    top, right, bottom, left = rng.uniform(0.0, 0.1, 4)
    return ops.crop_and_scale_back(image, (top, right, bottom, left))


def turn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate by up to 20 degrees; what comes in at the corners is drawn, too."""
    degrees = float(rng.uniform(-20.0, 20.0))
    border = ops.BORDERS[int(rng.integers(len(ops.BORDERS)))]
    return ops.rotate(image, degrees, border=border)


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of 0 to 2 pixels, or a mean over 1 to 5."""
    if rng.random() < 0.5:
        return ops.gaussian_blur(image, float(rng.uniform(0.0, 2.0)))
    return ops.box_blur(image, int(rng.integers(1, 6)))


def smear(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Motion blur over 3 to 11 pixels, or a bilateral filter."""
    if rng.random() < 0.5:
        side = 2 * int(rng.integers(1, 6)) + 1
        return ops.motion_blur(image, side, float(rng.uniform(0.0, 360.0)))
    color, space = rng.uniform(10.0, 250.0, 2)
    return ops.bilateral(image, int(rng.integers(1, 6)), float(color), float(space))


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper on up to 3 % of the pixels, or Gaussian noise equal on the channels."""
    shape = image.shape[:2]
    if rng.random() < 0.5:
        share = rng.uniform(0.0, 0.03)
        drawn = rng.random(shape, dtype=np.float32)
        mask = np.where(drawn < share / 2, -1, np.where(drawn < share, 1, 0)).astype(np.int8)
        return ops.salt_and_pepper(image, mask)
    sigma = rng.uniform(0.0, 0.05 * 255)
    return ops.add_noise(image, rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma))


def contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast by 0.6 to 1.4; half of the time each channel by its own."""
    own = rng.random() < 0.5
    factors = rng.uniform(0.6, 1.4, 3) if own else np.repeat(rng.uniform(0.6, 1.4), 3)
    return ops.linear_contrast(image, factors)


def sharpen(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sharpened copy mixed in by up to its whole, lightness 0.75 to 1.5."""
    alpha, lightness = rng.uniform(0.0, 1.0), rng.uniform(0.75, 1.5)
    return ops.sharpen(image, alpha=float(alpha), lightness=float(lightness))


def brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness by up to 30 levels, by 0.5 to 1.5, or both."""
    which = int(rng.integers(3))
    add = float(rng.uniform(-30.0, 30.0)) if which != 1 else 0.0
    factor = float(rng.uniform(0.5, 1.5)) if which != 0 else 1.0
    return ops.brightness(image, add=add, factor=factor)


def saturation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Saturation by up to 75 levels, or by 0 to 3."""
    if rng.random() < 0.5:
        return ops.saturation(image, add=float(rng.uniform(-75.0, 75.0)))
    return ops.saturation(image, factor=float(rng.uniform(0.0, 3.0)))


def hue(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hue by up to a turn, or by a factor of -3 to 3."""
    if rng.random() < 0.5:
        return ops.hue(image, add=float(rng.uniform(-255.0, 255.0)))
    return ops.hue(image, factor=float(rng.uniform(-3.0, 3.0)))


FILTERS: dict[str, Op] = {
    "blur": blur,
    "smear": smear,
    "noise": noise,
    "contrast": contrast,
    "sharpen": sharpen,
    "brightness": brightness,
    "saturation": saturation,
    "hue": hue,
}
TOP_GROUPS: dict[str, Op] = {"flip": flip, "crop": crop, "turn": turn}


class MyAugment:
    """The original's augmentation, all of its draws from the generator it is given.

    Mirroring, cropping, rotating and filtering come in random order. Each of the first three
    happens with probability 0.5. Filtering picks 0 to 3 of the eight filters, in random order, and
    each of those happens with probability 0.8.
    """

    name = "my"

    def plan(self, rng: np.random.Generator) -> list[str]:
        """The names of the operations that one image gets, in order."""
        steps: list[str] = []
        for group in rng.permutation([*TOP_GROUPS, "filters"]).tolist():
            if group != "filters":
                if rng.random() < TOP_PROBABILITY:
                    steps.append(group)
                continue
            number = int(rng.integers(MOST_FILTERS + 1))
            for name in rng.permutation(list(FILTERS))[:number].tolist():
                if rng.random() < FILTER_PROBABILITY:
                    steps.append(name)
        return steps

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)`` in and out, same shape; the input is not written to."""
        for name in self.plan(rng):
            image = (TOP_GROUPS.get(name) or FILTERS[name])(image, rng)
        return image
