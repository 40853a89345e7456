"""The single operations behind MyAugment: geometry, blur, noise, contrast, sharpness, colour.

Each takes uint8 RGB ``(H, W, 3)`` and gives a new image of the same shape; nothing here is random.
"""

from __future__ import annotations

import cv2
import numpy as np

BORDERS = (
    cv2.BORDER_CONSTANT,
    cv2.BORDER_REPLICATE,
    cv2.BORDER_REFLECT,
    cv2.BORDER_REFLECT_101,
    cv2.BORDER_WRAP,
)
Image = np.ndarray


def mirror(image: Image) -> Image:
    """Left and right exchanged."""
    return cv2.flip(image, 1)


def crop_and_scale_back(image: Image, shares: tuple[float, float, float, float]) -> Image:
    """Cut ``top, right, bottom, left`` (shares of the side in [0, 0.5)) and scale back.

    At least one pixel is left of each side.
    """
    height, width = image.shape[:2]
    top, bottom = int(shares[0] * height), height - int(shares[2] * height)
    left, right = int(shares[3] * width), width - int(shares[1] * width)
    inner = image[top : max(bottom, top + 1), left : max(right, left + 1)]
    return cv2.resize(inner, (width, height), interpolation=cv2.INTER_LINEAR)


def rotate(image: Image, degrees: float, *, border: int) -> Image:
    """Turn counter-clockwise about the middle; ``border`` is one of ``BORDERS``."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=border)


def gaussian_blur(image: Image, sigma: float) -> Image:
    """Blur with a standard deviation in pixels; below 0.05 nothing happens."""
    if sigma < 0.05:
        return image.copy()
    return cv2.GaussianBlur(image, (0, 0), sigma)


def box_blur(image: Image, side: int) -> Image:
    """Mean over ``side`` x ``side`` pixels."""
    return cv2.blur(image, (side, side))


def motion_blur(image: Image, side: int, degrees: float) -> Image:
    """Mean along a line of ``side`` pixels (odd, at least 3) in a direction."""
    kernel = np.zeros((side, side), np.float32)
    kernel[side // 2] = 1.0
    matrix = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), degrees, 1.0)
    kernel = cv2.warpAffine(kernel, matrix, (side, side))
    return cv2.filter2D(image, -1, kernel / kernel.sum())


def bilateral(image: Image, diameter: int, sigma_color: float, sigma_space: float) -> Image:
    """Blur that keeps edges; ``diameter`` in pixels, at least 1."""
    return cv2.bilateralFilter(image, diameter, sigma_color, sigma_space)


def salt_and_pepper(image: Image, mask: np.ndarray) -> Image:
    """Pixels where ``mask`` ``(H, W)`` is above 0 become white, below 0 black."""
    out = image.copy()
    out[mask > 0] = 255
    out[mask < 0] = 0
    return out


def add_noise(image: Image, noise: np.ndarray) -> Image:
    """Add ``noise`` ``(H, W)`` in levels, the same to the three channels."""
    return _clip(image.astype(np.float32) + noise[..., None])


def linear_contrast(image: Image, factors: np.ndarray) -> Image:
    """Distance from mid-grey (128) times a factor of each channel, shape ``(3,)``."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    return _lookup(image, _clip(128 + (levels - 128) * factors))


def sharpen(image: Image, *, alpha: float, lightness: float) -> Image:
    """Mix with a sharpened copy.

    Args:
        alpha: share of the copy, in [0, 1].
        lightness: the copy's brightness; 1 keeps the mean of the image.
    """
    identity = np.zeros((3, 3), np.float32)
    identity[1, 1] = 1.0
    edges = np.full((3, 3), -1.0, np.float32)
    edges[1, 1] = 8.0 + lightness
    return cv2.filter2D(image, -1, (1 - alpha) * identity + alpha * edges)


def brightness(image: Image, *, add: float = 0.0, factor: float = 1.0) -> Image:
    """Brightness (the largest channel) times ``factor`` plus ``add`` levels; hue is kept."""
    return _in_hsv(image, 2, add=add, factor=factor, top=255)


def saturation(image: Image, *, add: float = 0.0, factor: float = 1.0) -> Image:
    """Saturation in [0, 255] times ``factor`` plus ``add``."""
    return _in_hsv(image, 1, add=add, factor=factor, top=255)


def hue(image: Image, *, add: float = 0.0, factor: float = 1.0) -> Image:
    """The colour's angle, a full turn being 256: times ``factor`` plus ``add``, wrapped."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turned = np.arange(256, dtype=np.float64) * factor + add
    table = (np.rint(turned).astype(np.int64) % 256).astype(np.uint8)
    hsv[..., 0] = table[hsv[..., 0]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _in_hsv(image: Image, channel: int, *, add: float, factor: float, top: int) -> Image:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    levels = np.arange(256, dtype=np.float64) * factor + add
    table = np.clip(np.rint(levels), 0, top).astype(np.uint8)
    hsv[..., channel] = table[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _lookup(image: Image, tables: np.ndarray) -> Image:
    """A table of 256 levels for each channel, ``(256, 3)``."""
    return cv2.LUT(image, np.ascontiguousarray(tables[:, None, :]).reshape(1, 256, 3))
