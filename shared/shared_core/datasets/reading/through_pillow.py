"""What Pillow decodes: BMP, TIFF, GIF, AVIF. Samples of 8 bits, or of 16 as they are stored."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from shared_core.datasets.errors import UnsupportedImageError
from shared_core.datasets.reading.image_headers import check_pixels, stated_size
from shared_core.datasets.reading.samples import Decoded, Remark, through_opencv
from shared_core.datasets.reading.tiff_file import TiffFile

_ALPHA = {"LA": "straight", "RGBA": "straight", "La": "premultiplied", "RGBa": "premultiplied"}


def through_pillow(data: bytes, kind: str, name: str) -> tuple[Decoded, tuple[Remark, ...]]:
    """Decode; a TIFF's strips are looked at before and after.

    Raises:
        UnsupportedImageError: of a kind that is not read, or too large.
        Exception: what Pillow raises on a damaged file, which is nearly anything.
    """
    if kind == "tiff":
        return _tiff(data, name)
    with _opened(data, kind, name) as image:
        image.load()
        if image.mode in ("P", "PA") or "transparency" in image.info:
            image = image.convert("RGBA" if _is_see_through(image) else "RGB")
        elif image.mode not in ("L", "RGB", "LA", "RGBA"):
            image = image.convert("RGB")
        return Decoded(np.asarray(image), alpha=_ALPHA.get(image.mode)), ()


def _is_see_through(image: Image.Image) -> bool:
    return image.mode == "PA" or "transparency" in image.info


def _opened(data: bytes, kind: str, name: str) -> Image.Image:
    """The file with its size checked, no pixel decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except KeyError:
        raise UnsupportedImageError(
            f"{name}: the Pillow that is installed cannot read {kind.upper()}; update it, or save "
            "the image as PNG"
        ) from None
    except Image.DecompressionBombError as error:
        raise UnsupportedImageError(f"{name}: {error}") from None
    check_pixels(image.height, image.width, name)
    stated = stated_size(data)
    # Pillow may turn a TIFF on its side; a GIF's first picture may be larger than its screen.
    if kind in ("bmp", "tiff") and stated and sorted(stated) != sorted(image.size):
        raise ValueError(f"it states {stated} and {image.size} pixels")
    return image


def _tiff(data: bytes, name: str) -> tuple[Decoded, tuple[Remark, ...]]:
    file = TiffFile(data, name=name)
    facts = file.facts
    file.check()
    remarks: tuple[Remark, ...] = ()
    if facts.extra:
        remarks = (
            Remark(
                "extra_band",
                f"band {facts.bands} is not declared as alpha (TIFF tag 338) and is left out",
            ),
        )
    with _opened(data, "tiff", name) as image:
        if image.mode in ("F", "I"):
            what = "float32" if image.mode == "F" else "32-bit"
            raise UnsupportedImageError(
                f"{name}: {what} samples are not supported, expected 8 or 16 bits"
            )
        image.load()  # refuses what cannot be decoded, whoever decodes it at last
        file.check_fax(image)
        if facts.bits > 8:
            top = (1 << facts.bits) - 1
            if facts.bands == 1:
                samples = np.asarray(image).astype(np.uint16)
                return Decoded(samples, top=top), remarks
            samples = through_opencv(data)
            if facts.extra:
                samples = samples[..., : facts.bands - 1]
            return Decoded(samples, bgr=True, alpha=facts.alpha, top=top), remarks
        if facts.extra:
            image = image.convert("L" if facts.bands == 2 else "RGB")
        elif image.mode not in ("L", "RGB", *_ALPHA):
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return Decoded(np.asarray(image), alpha=_ALPHA.get(image.mode)), remarks
