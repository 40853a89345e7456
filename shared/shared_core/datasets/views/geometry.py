"""Resizing, cropping and letterboxing of RGB uint8 images ``(H, W, 3)``, sizes exact.

The named methods:

- ``linear``: bilinear, half-pixel centres, no smoothing: it aliases below half size;
- ``area``: the mean over the source area of each target pixel;
- ``cubic``: bicubic (a = -0.75), half-pixel centres, no smoothing;
- ``reduced``: the mean over the largest whole block that leaves at least the target size, then
  ``linear``: nearly as smooth as ``area`` and much faster.
"""

from __future__ import annotations

import cv2
import numpy as np

from shared_core.datasets.reading.image_headers import Pixels

METHODS = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "reduced": cv2.INTER_LINEAR,
}
Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def resize(
    image: Pixels, size: Size, *, method: str = "linear", out: Pixels | None = None
) -> Pixels:
    """Resize to exactly ``size = (height, width)`` pixels.

    Args:
        image: uint8 ``(H, W, 3)``.
        size: pixels, at least 1 each.
        method: see the module.
        out: where to write, uint8 ``(height, width, 3)``; a new array by default.

    Raises:
        ValueError: unknown method, empty image, a size below 1, or ``out`` of another shape.
    """
    if method not in METHODS:
        raise ValueError(f"resize method {method!r}, expected one of {', '.join(METHODS)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"resize to {height} x {width}, expected at least 1 x 1")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image of shape {image.shape}, expected (H, W, 3) and not empty")
    if out is not None and out.shape != (height, width, 3):
        raise ValueError(f"out of shape {out.shape}, expected {(height, width, 3)}")
    if image.shape[:2] == (height, width):
        if out is None:
            return image.copy()
        out[...] = image
        return out
    if method == "reduced":
        rows, columns = image.shape[0] // height, image.shape[1] // width
        if rows > 1 or columns > 1:
            image = _block_mean(image, max(rows, 1), max(columns, 1))
    result: Pixels = np.asarray(
        cv2.resize(image, (width, height), dst=out, interpolation=METHODS[method]), dtype=np.uint8
    )
    if out is None:
        return result
    if result is not out and not np.shares_memory(result, out):
        out[...] = result
    return out


def _block_mean(image: Pixels, rows: int, columns: int) -> Pixels:
    """Mean over blocks of ``rows`` x ``columns`` pixels; a last incomplete block is cut off."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    # Cut evenly at both ends, so that the picture does not shift.
    top, left = (image.shape[0] - height * rows) // 2, (image.shape[1] - width * columns) // 2
    whole = image[top : top + height * rows, left : left + width * columns]
    mean = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(mean, dtype=np.uint8)


def short_side_size(size: Size, short: int) -> Size:
    """The size after resizing the shorter side to ``short``; the longer side is rounded down.

    Source: the rule of torchvision's ``Resize(int)``; at least 1 pixel.
    """
    height, width = size
    if height <= width:
        return short, max(1, short * width // height)
    return max(1, short * height // width), short


def center_box(size: Size, crop: Size) -> Box:
    """The centred box of ``crop`` within ``size``; odd margins round half to even.

    Raises:
        ValueError: the crop is larger than the image.
    """
    if crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"crop {crop[0]} x {crop[1]} from {size[0]} x {size[1]} pixels")
    return (round((size[0] - crop[0]) / 2), round((size[1] - crop[1]) / 2), crop[0], crop[1])


def letterbox_box(size: Size, target: Size) -> Box:
    """Where an image of ``size`` lies in a letterbox of ``target``: the largest that fits, centred.

    The side that does not fill is rounded to the nearest pixel (half up), at least 1; an odd
    margin has its extra pixel at the bottom or right.
    """
    height, width = size
    if target[0] * width <= target[1] * height:  # the height fills
        new = (target[0], max(1, (2 * width * target[0] + height) // (2 * height)))
    else:
        new = (max(1, (2 * height * target[1] + width) // (2 * width)), target[1])
    return ((target[0] - new[0]) // 2, (target[1] - new[1]) // 2, new[0], new[1])


def letterbox(
    image: Pixels,
    size: Size,
    fill: int | tuple[int, int, int] = 114,
    *,
    method: str = "linear",
    out: Pixels | None = None,
) -> Pixels:
    """Fit the whole image into ``size`` without distortion, the rest filled with ``fill``.

    Args:
        image: uint8 ``(H, W, 3)``.
        size: ``(height, width)`` of the result in pixels.
        fill: grey level or RGB, 0 to 255.
        method: see the module.
        out: where to write; a new array by default.
    """
    if out is None:
        out = np.empty((*size, 3), dtype=np.uint8)
    elif out.shape != (*size, 3):
        raise ValueError(f"out of shape {out.shape}, expected {(*size, 3)}")
    top, left, height, width = letterbox_box((image.shape[0], image.shape[1]), size)
    out[:top] = fill
    out[top + height :] = fill
    out[top : top + height, :left] = fill
    out[top : top + height, left + width :] = fill
    inside = out[top : top + height, left : left + width]
    resize(image, (height, width), method=method, out=inside)
    return out
