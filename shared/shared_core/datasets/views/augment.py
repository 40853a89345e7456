"""Views: what training or evaluation sees of an image, decided by (seed, key, view) alone.

Every random number of a view comes from a counter-based generator keyed by the seed, the image's
key and the view's number, so that a view can be replayed: the same pixels in any batch, thread,
order or process, and the same crop whether the image comes from a file, a cache or an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.views.geometry import (
    METHODS,
    Box,
    Size,
    center_box,
    resize,
    short_side_size,
)
from shared_core.datasets.views.randaugment import RandAugment
from shared_core.datasets.views.random_ops import (
    augment_small_batch,
    color_jitter,
    crop_flip_batch,
    hflip,
    random_erasing,
    random_resized_crop_box,
)
from shared_core.datasets.views.view_random import Key, ViewRandom, view_rng

__all__ = [
    "EvalView",
    "Key",
    "Plan",
    "RandAugment",
    "SmallView",
    "TrainView",
    "View",
    "ViewRandom",
    "augment_small_batch",
    "color_jitter",
    "hflip",
    "place",
    "random_erasing",
    "random_resized_crop_box",
    "view_rng",
]


LARGEST_RESIZED = 1 << 24  # pixels (48 MB); of what would be larger, only the window is made


class Plan(NamedTuple):
    """The geometry of one view: cut ``box``, resize it to ``size``, cut ``window``, mirror."""

    box: Box  # of the upright image, pixels
    size: Size  # pixels
    window: Box | None  # of the resized box; None for all of it
    horizontal: bool
    vertical: bool


class View(Protocol):
    """What the loader asks of a view."""

    size: Size
    seed: int
    dct_scaled: bool

    def plan(self, rng: np.random.Generator, height: int, width: int) -> Plan:
        """Draw the geometry for an image of this size."""

    def finish(self, image: Pixels, plan: Plan, rng: np.random.Generator, out: Pixels) -> None:
        """Write the view of ``image``, already of the plan's scale, to ``out``."""

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""


class TrainView:
    """Random resized crop, flips, then colour: RandAugment, jitter, erasing.

    Args:
        size: of the result, pixels (one number for a square).
        scale, ratio: see ``random_resized_crop_box``.
        hflip, vflip: probabilities.
        randaugment: a policy string (see ``RandAugment``), or None.
        erasing: probability; ``erasing_mode`` and ``erasing_count`` as in ``random_erasing``.
        color_jitter: (brightness, contrast, saturation[, hue]), or one number for the first three.
        seed: of all views.
        method: of the resize (see ``geometry``).
        dct_scaled: let a JPEG be decoded at 1/2, 1/4 or 1/8 where the crop stays at least as large
            as the result. It is faster and smoother; without it files and caches of whole images
            give equal pixels.

    Raises:
        ValueError: a probability outside [0, 1], a bad range or policy.
    """

    def __init__(
        self,
        size: int | Size,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        randaugment: str | None = None,
        erasing: float = 0.0,
        erasing_mode: str = "pixel",
        erasing_count: int = 1,
        color_jitter: float | Sequence[float] | None = None,
        seed: int = 0,
        method: str = "linear",
        dct_scaled: bool = True,
    ) -> None:
        self.size = _pair(size)
        for name, value in (("hflip", hflip), ("vflip", vflip), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value}, expected a probability in [0, 1]")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crop scale {scale}, expected 0 < low <= high <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"crop ratio {ratio}, expected 0 < low <= high")
        if erasing_mode not in ("const", "rand", "pixel") or erasing_count < 1:
            raise ValueError(
                f"erasing {erasing_mode!r} x {erasing_count},"
                " expected const, rand or pixel, at least 1"
            )
        _check_method(method)
        jitter = (color_jitter,) * 3 if isinstance(color_jitter, int | float) else color_jitter
        if jitter is not None and (len(jitter) not in (3, 4) or min(jitter) < 0):
            raise ValueError(f"color jitter {color_jitter}, expected 3 or 4 numbers of at least 0")
        self.scale, self.ratio, self.hflip, self.vflip = scale, ratio, hflip, vflip
        self.randaugment = None if randaugment is None else RandAugment(randaugment)
        self.erasing, self.erasing_mode, self.erasing_count = erasing, erasing_mode, erasing_count
        self.jitter = None if jitter is None else (*map(float, jitter), 0.0)[:4]
        self.seed, self.method, self.dct_scaled = seed, method, dct_scaled

    def plan(self, rng: np.random.Generator, height: int, width: int) -> Plan:
        """Draw the crop and the flips."""
        box = random_resized_crop_box(rng, height, width, scale=self.scale, ratio=self.ratio)
        across, down = rng.random(2).tolist()
        return Plan(box, self.size, None, across < self.hflip, down < self.vflip)

    def finish(self, image: Pixels, plan: Plan, rng: np.random.Generator, out: Pixels) -> None:
        """Cut, resize, mirror, recolour into ``out``."""
        plain = self.randaugment is None and self.jitter is None
        place(image, plan, self.method, out)
        if not plain:
            result: Pixels = out
            if self.randaugment is not None:
                result = self.randaugment(result, rng)
            if self.jitter is not None:
                b, c, s, h = self.jitter
                result = color_jitter(result, rng, brightness=b, contrast=c, saturation=s, hue=h)
            if result is not out:
                out[...] = result
        if self.erasing > 0:
            random_erasing(
                out,
                rng,
                probability=self.erasing,
                mode=self.erasing_mode,
                count=self.erasing_count,
            )

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "train",
            "size": list(self.size),
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "hflip": self.hflip,
            "vflip": self.vflip,
            "randaugment": None if self.randaugment is None else self.randaugment.policy,
            "erasing": [self.erasing, self.erasing_mode, self.erasing_count],
            "color_jitter": None if self.jitter is None else list(self.jitter),
            "seed": self.seed,
            "method": self.method,
            "dct_scaled": self.dct_scaled,
        }

    def __call__(
        self, image: Pixels, rng: np.random.Generator, out: Pixels | None = None
    ) -> Pixels:
        """The view of a whole upright image, uint8 ``(H, W, 3)``."""
        return _call(self, image, rng, out)


class EvalView:
    """Resize the short side to ``size * resize_ratio``, cut the centre; nothing random.

    ``resize_ratio`` None squeezes the whole image to ``size`` instead (aspect ratio not kept).
    """

    def __init__(
        self,
        size: int | Size,
        *,
        resize_ratio: float | None = 256 / 224,
        method: str = "linear",
        dct_scaled: bool = True,
    ) -> None:
        self.size = _pair(size)
        if resize_ratio is not None and resize_ratio < 1:
            raise ValueError(f"resize ratio {resize_ratio}, expected at least 1")
        _check_method(method)
        self.resize_ratio, self.method, self.dct_scaled = resize_ratio, method, dct_scaled
        self.seed = 0

    def plan(self, rng: np.random.Generator | None, height: int, width: int) -> Plan:
        """The same for every image of this size; ``rng`` is not used."""
        box = (0, 0, height, width)
        if self.resize_ratio is None:
            return Plan(box, self.size, None, False, False)
        target = short_side_size((height, width), round(max(self.size) * self.resize_ratio))
        return Plan(box, target, center_box(target, self.size), False, False)

    def finish(
        self, image: Pixels, plan: Plan, rng: np.random.Generator | None, out: Pixels
    ) -> None:
        """Resize and cut into ``out``."""
        place(image, plan, self.method, out)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "eval",
            "size": list(self.size),
            "resize_ratio": self.resize_ratio,
            "method": self.method,
            "dct_scaled": self.dct_scaled,
        }

    def __call__(
        self, image: Pixels, rng: np.random.Generator | None = None, out: Pixels | None = None
    ) -> Pixels:
        """The view of a whole upright image, uint8 ``(H, W, 3)``."""
        return _call(self, image, view_rng(0, 0, 0) if rng is None else rng, out)


class SmallView:
    """Crop after padding, and mirror: for images that already have the size (32 px and such).

    The loader makes such views a batch at a time; see ``augment_small_batch``.
    """

    def __init__(
        self,
        size: int | Size,
        *,
        pad: int = 4,
        fill: str = "zero",
        hflip: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.size = _pair(size)
        if pad < 0 or fill not in ("zero", "reflect"):
            raise ValueError(f"pad {pad} by {fill!r}, expected at least 0 by zero or reflect")
        self.pad, self.fill, self.hflip, self.seed = pad, fill, hflip, seed
        self.dct_scaled = False

    def batch(
        self, images: Pixels, keys: Sequence[Key], view: int, random: ViewRandom, out: Pixels
    ) -> None:
        """Write the views of ``images`` uint8 ``(N, H, W, 3)`` to ``out``, same shape."""
        crop_flip_batch(
            images, keys, view, self.seed, self.pad, self.fill, self.hflip, random=random, out=out
        )

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "small",
            "size": list(self.size),
            "pad": self.pad,
            "fill": self.fill,
            "hflip": self.hflip,
            "seed": self.seed,
        }


def place(image: Pixels, plan: Plan, method: str, out: Pixels) -> None:
    """Carry out a plan: cut, resize, cut the window, mirror, into ``out``."""
    top, left, height, width = plan.box
    source = image[top : top + height, left : left + width]
    if plan.size[0] * plan.size[1] > LARGEST_RESIZED:
        source, plan = cut_first(source, plan)
    mirrored = plan.horizontal or plan.vertical
    if plan.window is None and not mirrored:
        resize(source, plan.size, method=method, out=out)
        return
    resized = resize(source, plan.size, method=method)
    if plan.window is not None:
        top, left, height, width = plan.window
        resized = resized[top : top + height, left : left + width]
    if mirrored:
        code = -1 if plan.horizontal and plan.vertical else int(plan.horizontal)
        cv2.flip(resized, code, dst=out)
    else:
        out[...] = resized


def cut_first(source: Pixels, plan: Plan) -> tuple[Pixels, Plan]:
    """Cut what the window needs out of ``source``, and the plan that is left to do.

    A picture of 1 x 20000 pixels whose short side becomes 256 would have 1.3 gigapixels, of which
    a window of 224 x 224 is wanted. The scale stays, but for the rounding of the sizes; a few
    pixels around the window are kept for the interpolation.
    """
    if plan.window is None:
        return source, plan
    parts, sizes, starts = [], [], []
    for length, target, start, wanted in zip(
        source.shape[:2], plan.size, plan.window[:2], plan.window[2:], strict=True
    ):
        first = max(0, start * length // target - 4)
        last = min(length, -(-(start + wanted) * length // target) + 4)
        size = max(wanted, round((last - first) * target / length))
        parts.append(slice(first, last))
        sizes.append(size)
        starts.append(min(max(0, start - round(first * target / length)), size - wanted))
    part = source[parts[0], parts[1]]
    window = (starts[0], starts[1], plan.window[2], plan.window[3])
    box = (0, 0, part.shape[0], part.shape[1])
    return part, plan._replace(box=box, size=(sizes[0], sizes[1]), window=window)


def _call(
    view: TrainView | EvalView, image: Pixels, rng: np.random.Generator, out: Pixels | None
) -> Pixels:
    out = np.empty((*view.size, 3), dtype=np.uint8) if out is None else out
    view.finish(image, view.plan(rng, image.shape[0], image.shape[1]), rng, out)
    return out


def _pair(size: int | Size) -> Size:
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        raise ValueError(f"view size {size}, expected at least 1 pixel")
    return pair


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"resize method {method!r}, expected one of {', '.join(METHODS)}")
