"""Samples as a library decoded them, 8 or 16 bits, with or without alpha, become RGB of 8 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from shared_core.datasets.reading.image_headers import Pixels

Samples = npt.NDArray[np.unsignedinteger]
_BLOCK = 1 << 18  # pixels that are worked on at a time


class Remark(NamedTuple):
    """What a user should know of an image that was read all the same: a kind, and a line."""

    kind: str
    detail: str


class Decoded(NamedTuple):
    """Samples ``(H, W)`` or ``(H, W, 1 to 4)`` of unsigned 8 or 16 bits, and what they mean.

    ``bgr`` says that blue comes first; ``alpha`` that the last channel is one, "straight" or
    "premultiplied"; ``top`` is the sample that is white.
    """

    samples: Samples
    bgr: bool = False
    alpha: str | None = None
    top: int = 255


def through_opencv(data: bytes) -> Samples:
    """Decode as stored: grey, BGR or BGRA.

    Raises:
        ValueError: it cannot be decoded, or has other samples than 8 or 16 bits.
    """
    decoded: Any = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("OpenCV cannot decode it")
    if decoded.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{decoded.dtype} samples are not supported, expected 8 or 16 bits")
    samples: Samples = decoded
    return samples


def dim(decoded: Decoded) -> tuple[Remark, ...]:
    """A remark where a file of 16 bits holds a picture of 14 bits or fewer."""
    samples = decoded.samples
    colors = samples if samples.ndim == 2 or decoded.alpha is None else samples[..., :-1]
    peak = int(colors.max())
    if not 0 < peak <= decoded.top // 4:
        return ()
    likely = (1 << peak.bit_length()) - 1
    return (
        Remark(
            "dim",
            f"16-bit samples reach {peak} of {decoded.top} only, so it is nearly black; if white "
            f"is {likely}, make 8-bit images of it by smallvision prepare --scale-max {likely}",
        ),
    )


def to_rgb(decoded: Decoded) -> Pixels:
    """RGB uint8 ``(H, W, 3)``, contiguous; alpha composited on white, ``top`` becomes 255.

    A block of rows at a time, so that the wide numbers of the arithmetic stay few.
    """
    image, bgr, alpha, top = decoded
    if image.ndim == 2:
        image = image[..., None]
    colors = 3 if image.shape[2] >= 3 else 1
    if alpha is None and image.dtype == np.uint8:
        plain = image[..., colors - 1 :: -1] if bgr else image[..., :colors]
        return np.ascontiguousarray(np.broadcast_to(plain, (*image.shape[:2], 3)), dtype=np.uint8)
    out: Pixels = np.empty((*image.shape[:2], 3), np.uint8)
    step = max(1, _BLOCK // max(1, image.shape[1]))
    for row in range(0, len(image), step):
        block = np.minimum(image[row : row + step].astype(np.uint32), np.uint32(top))
        color = block[..., :colors]
        if alpha is not None:
            # Unsigned 32 bits hold it: color * alpha + top * (top - alpha) + top // 2 < 2**32.
            clear = top - block[..., -1:]
            if alpha == "premultiplied":
                color = np.minimum(color + clear, top)
            else:
                color = (color * block[..., -1:] + top * clear + top // 2) // top
        if top != 255:
            color = (color * 255 + top // 2) // top
        out[row : row + step] = color[..., ::-1] if bgr else color
    return out
