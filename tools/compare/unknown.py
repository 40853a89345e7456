""" "None of these": from which probability on an answer counts, and what else it lets through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.datasets import DatasetError, digits, render_scene, scene_class_names
from shared_core.deploy.write import generated_images

KEEP = 0.95  # share of known images whose answer should count
COUNT = 100  # strange images of each kind
SEED = 20_000  # of the drawn scenes: none that a demonstration trains on

Images = npt.NDArray[np.uint8]
Top = npt.NDArray[np.floating[Any]]  # largest probability of each image, (N,)


def threshold_of(top: Top, *, keep: float = KEEP) -> float:
    """The largest threshold that at least ``keep`` of these known images reach.

    Args:
        top: of calibration images.
        keep: fraction above 0.
    """
    if not len(top) or not 0 < keep <= 1:
        raise ValueError(
            f"{len(top)} images, keep {keep}: expected at least one, and 0 < keep <= 1"
        )
    kept = math.ceil(keep * len(top) - 1e-9)
    return float(np.sort(top)[len(top) - kept])


def strange_images(
    view: Callable[[Images], Images], classes: Sequence[str], *, count: int = COUNT
) -> dict[str, Images]:
    """Views of images that are of none of these classes, by kind: drawn scenes, digits, noise.

    Classes of the drawn scenes that the network knows are left out.
    """
    others = [name for name in scene_class_names() if name not in set(classes)]
    drawn: dict[str, list[Images]] = {}
    if others:
        drawn["drawn scenes"] = [
            render_scene(others[n % len(others)], n, size=128, seed=SEED)[0] for n in range(count)
        ]
    if not set(map(str, range(10))) <= set(classes):
        try:
            drawn["handwritten digits"] = list(digits(size=64)[0][:count])
        except (ImportError, DatasetError):
            pass  # scikit-learn brings them along; without it they are left out
    drawn["noise"] = list(generated_images((64, 64), count))
    return {kind: np.stack([view(one) for one in images]) for kind, images in drawn.items()}


def describe(threshold: float, known: Top, strange: Mapping[str, Top]) -> dict[str, Any]:
    """What the threshold does, for :class:`compare.contract.Judged`.

    Args:
        known: largest probabilities of test images, which chose nothing.
        strange: by kind.
    """
    everything = np.concatenate(list(strange.values()))
    kinds = ", ".join(f"{len(top)} of {kind}" for kind, top in strange.items())
    return {
        "threshold": threshold,
        "kept": float((known >= threshold).mean()),
        "false_accepts": float((everything >= threshold).mean()),
        "by_kind": {kind: float((top >= threshold).mean()) for kind, top in strange.items()},
        "source": f"images made by this program: {kinds}. Pictures of classes that were left out "
        "were not asked: that needs a network trained without them.",
    }
