"""The views that evaluation can take of an image, and how one is made again from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shared_core.datasets.reading.image_headers import Pixels
from shared_core.datasets.views.augment import EvalView, Plan
from shared_core.datasets.views.geometry import METHODS, Size, letterbox, letterbox_box


class LetterboxView:
    """Fit the whole image into ``size`` without distortion, centred, the rest filled.

    Args:
        size: of the result, pixels (one number for a square).
        fill: grey level of the margins, 0 to 255.
        method: of the resize (see ``geometry``).
        dct_scaled: let a JPEG be decoded at 1/2, 1/4 or 1/8 where that is still as large as its
            place in the letterbox.

    Raises:
        ValueError: a size below 1, a fill outside 0 to 255, an unknown method.
    """

    seed = 0

    def __init__(
        self,
        size: int | Size,
        *,
        fill: int = 0,
        method: str = "reduced",
        dct_scaled: bool = True,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise ValueError(f"view size {size}, expected at least 1 pixel")
        if not 0 <= fill <= 255:
            raise ValueError(f"letterbox fill {fill}, expected 0 to 255")
        if method not in METHODS:
            raise ValueError(f"resize method {method!r}, expected one of {', '.join(METHODS)}")
        self.fill, self.method, self.dct_scaled = int(fill), method, dct_scaled

    def plan(self, rng: np.random.Generator | None, height: int, width: int) -> Plan:
        """The whole image goes to its place in the letterbox; ``rng`` is not used."""
        _, _, rows, columns = letterbox_box((height, width), self.size)
        return Plan((0, 0, height, width), (rows, columns), None, False, False)

    def finish(
        self, image: Pixels, plan: Plan, rng: np.random.Generator | None, out: Pixels
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(H, W, 3)``."""
        letterbox(image, self.size, self.fill, method=self.method, out=out)

    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON."""
        return {
            "view": "letterbox",
            "size": list(self.size),
            "fill": self.fill,
            "method": self.method,
            "dct_scaled": self.dct_scaled,
        }

    def __call__(
        self, image: Pixels, rng: np.random.Generator | None = None, out: Pixels | None = None
    ) -> Pixels:
        """The view of a whole upright image, uint8 ``(H, W, 3)``."""
        out = np.empty((*self.size, 3), dtype=np.uint8) if out is None else out
        self.finish(image, self.plan(rng, image.shape[0], image.shape[1]), rng, out)
        return out


def rebuild_view(settings: Mapping[str, Any]) -> EvalView | LetterboxView:
    """The evaluation view whose ``settings()`` these are.

    Raises:
        ValueError: not the settings of an evaluation view: an unknown name, a missing or unknown
            entry, or a value that makes no sense.
    """
    views: dict[str, type[EvalView] | type[LetterboxView]] = {
        "eval": EvalView,
        "letterbox": LetterboxView,
    }
    values = dict(settings)
    name, size = values.pop("view", None), values.pop("size", None)
    if name not in views:
        raise ValueError(f"view {name!r}, expected one of {', '.join(views)}")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(_whole, size)):
        raise ValueError(f"view size {size!r}, expected height and width in pixels")
    try:
        view: EvalView | LetterboxView = views[name]((size[0], size[1]), **values)
    except TypeError as error:  # an entry that is unknown, or no number
        raise ValueError(f"view {name!r}: {error}") from None
    if missing := view.settings().keys() - settings.keys():
        raise ValueError(f"view {name!r} lacks {sorted(missing)[0]!r}")
    return view


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
