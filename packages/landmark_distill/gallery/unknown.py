"""When a search must say "unknown": the score that images of absent classes hardly reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.gallery.features import unit_rows
from landmark_distill.images.truths import folder_truths

QUERIES = 2000  # images that are asked, at most
CELLS = 1 << 24  # scores held at a time


def unknown_threshold(
    features: NDArray[Any], paths: Sequence[str], *, far: float, seed: int = 0
) -> dict[str, Any]:
    """The threshold of a gallery at a wanted false-accept rate, as plain JSON.

    Images ask the gallery as if their own class were not in it; a query is unknown when its
    nearest image scores no more than ``threshold``. At most a share ``far`` of these images does.

    Args:
        features: ``(N, D)``.
        paths: of the images, ``class/image`` or ``coarse/fine/image``.
        far: above 0, below 1.

    Returns:
        ``far``, ``threshold`` (a cosine; None where so few images cannot show the rate),
        ``images`` that were asked, ``classes``.

    Raises:
        ValueError: images in no folder, or of one class only.
    """
    labels = folder_truths(paths)["fine"]
    classes = len(np.unique(labels))
    if classes < 2:
        raise ValueError("--far: the gallery has one class, expected two or more folders")
    rng = np.random.default_rng(seed)
    asked = rng.permutation(len(labels))[:QUERIES]
    step = max(1, CELLS // len(labels))
    rows, best = unit_rows(np.asarray(features)).astype(np.float32), []
    for start in range(0, len(asked), step):
        some = asked[start : start + step]
        scores = rows[some] @ rows.T
        scores[labels[some][:, None] == labels[None, :]] = -2.0
        best.append(scores.max(axis=1))
    falling = np.sort(np.concatenate(best))[::-1]
    allowed = int(far * len(asked) + 1e-9)
    threshold = float(falling[allowed]) if allowed >= 1 else None
    return {"far": far, "threshold": threshold, "images": len(asked), "classes": classes}
