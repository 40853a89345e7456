"""The random steps of a view: crop box, erasing, colour jitter, padded crop of small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.views.geometry import Box
from shared_core.datasets.views.randaugment import (
    adjust_brightness,
    adjust_color,
    adjust_contrast,
    adjust_hue,
)
from shared_core.datasets.views.view_random import Key, ViewRandom

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, 0 to 255
IMAGENET_STD = (58.395, 57.12, 57.375)


def random_resized_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a crop: ten tries of random area and aspect ratio, then the centre.

    Args:
        rng: always gives 40 numbers, so that what follows does not depend on the image's size.
        height, width: the image, pixels.
        scale: range of the crop's area as a fraction of the image's.
        ratio: range of width over height, drawn uniformly in its logarithm.

    Returns:
        ``(top, left, height, width)`` within the image.

    Source: Szegedy et al. 2015, arXiv:1409.4842; the rules are torchvision's RandomResizedCrop.
    """
    draws = rng.random(40).tolist()
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for n in range(0, 40, 4):
        target = area * (scale[0] + (scale[1] - scale[0]) * draws[n])
        aspect = math.exp(low + (high - low) * draws[n + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[n + 2] * (height - h + 1))
            return top, int(draws[n + 3] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def hflip(image: Pixels) -> Pixels:
    """Mirror left and right; contiguous."""
    return np.asarray(cv2.flip(image, 1), dtype=np.uint8)


def random_erasing(
    image: Pixels,
    rng: np.random.Generator,
    *,
    probability: float,
    mode: str = "pixel",
    count: int = 1,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Pixels:
    """Overwrite random rectangles, in place.

    Args:
        image: uint8 ``(H, W, 3)``.
        rng: the view's generator.
        probability: that anything is erased, in [0, 1].
        mode: ``const`` fills with ``mean``, ``rand`` with one colour a rectangle, ``pixel`` with
            noise; both normal with ``mean`` and ``std`` (N(0, 1) after normalisation, clipped).
        count: rectangles; their areas share ``area``.
        area: range of the erased fraction of the image.
        ratio: range of height over width.
        mean, std: RGB levels, 0 to 255.

    Source: Zhong et al. 2017, arXiv:1708.04896; modes and counts as in timm.
    """
    if mode not in ("const", "rand", "pixel"):
        raise ValueError(f"erasing mode {mode!r}, expected const, rand or pixel")
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(count):
        for _attempt in range(10):
            u, v, y, x = rng.random(4).tolist()
            target = (area[0] + (area[1] - area[0]) * u) * height * width / count
            aspect = math.exp(low + (high - low) * v)
            h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            level: npt.NDArray[np.float64] = np.array(mean)
            if mode != "const":
                shape = (3,) if mode == "rand" else (h, w, 3)
                level = level + np.array(std) * rng.standard_normal(shape)
            image[top : top + h, left : left + w] = np.clip(np.rint(level), 0, 255).astype(np.uint8)
            break
    return image


def color_jitter(
    image: Pixels,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Pixels:
    """Change brightness, contrast, saturation and hue by random factors in random order.

    Factors are uniform in ``[max(0, 1 - x), 1 + x]``; the hue turns by up to ``hue`` (at most 0.5)
    of a circle. The rules are torchvision's ColorJitter.
    """
    steps = (
        (adjust_brightness, brightness),
        (adjust_contrast, contrast),
        (adjust_color, saturation),
    )
    order = rng.permutation(4).tolist()
    draws = rng.random(4).tolist()
    for step in order:
        if step == 3:
            if hue > 0:
                image = adjust_hue(image, (2 * draws[3] - 1) * hue)
        elif steps[step][1] > 0:
            function, x = steps[step]
            low = max(0.0, 1 - x)
            image = function(image, low + (1 + x - low) * draws[step])
    return image


def augment_small_batch(
    images: Pixels,
    keys: Sequence[Key],
    view: int,
    seed: int,
    pad: int = 4,
    *,
    fill: str = "zero",
    hflip: float = 0.5,
    out: Pixels | None = None,
) -> Pixels:
    """Pad, crop at random back to the size, and mirror: a whole batch of small images at once.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        keys: N keys; image n gets the numbers of ``view_rng(seed, keys[n], view)``.
        view: number of the view.
        seed: of all views.
        pad: pixels on each side.
        fill: ``zero`` or ``reflect`` (the border pixel is not repeated).
        hflip: probability of mirroring.
        out: where to write, the shape of ``images``, not ``images`` itself; new by default.

    Raises:
        ValueError: as many keys as images are needed; ``reflect`` needs ``pad < min(H, W)``.
    """
    if fill not in ("zero", "reflect"):
        raise ValueError(f"fill {fill!r}, expected zero or reflect")
    if images.ndim != 4 or len(keys) != len(images):
        raise ValueError(f"{len(keys)} keys for images of shape {images.shape}")
    if fill == "reflect" and pad >= min(images.shape[1:3]):
        raise ValueError(f"reflect pad {pad} for images of shape {images.shape}")
    out = np.empty_like(images) if out is None else out
    crop_flip_batch(images, keys, view, seed, pad, fill, hflip, random=ViewRandom(), out=out)
    return out


def crop_flip_batch(
    images: Pixels,
    keys: Sequence[Key],
    view: int,
    seed: int,
    pad: int,
    fill: str,
    hflip: float,
    *,
    random: ViewRandom,
    out: Pixels,
) -> None:
    """The work of ``augment_small_batch``, with the caller's generator."""
    number, height, width = images.shape[:3]
    draws = np.empty((number, 3))
    for n, key in enumerate(keys):
        random.at(seed, key, view).random(out=draws[n])
    tops = (draws[:, 0] * (2 * pad + 1)).astype(np.int64)
    lefts = (draws[:, 1] * (2 * pad + 1)).astype(np.int64)
    flips = draws[:, 2] < hflip
    if fill == "zero":
        padded = np.zeros((number, height + 2 * pad, width + 2 * pad, 3), dtype=np.uint8)
        padded[:, pad : pad + height, pad : pad + width] = images
    else:
        edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        padded = np.pad(images, edges, mode="reflect")
    for n, (top, left, flip) in enumerate(
        zip(tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)
    ):
        window = padded[n, top : top + height, left : left + width]
        if flip:
            cv2.flip(window, 1, dst=out[n])
        else:
            out[n] = window
