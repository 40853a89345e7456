"""Does an exported file answer as the network that it was made from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.deploy.session import open_session

Array = npt.NDArray[Any]
TIE = 1e-5  # probabilities that are nearer to each other than this have no order


class ExportError(ValueError):
    """An exported model does not give the answers of the model it was made from."""


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from its source, over all outputs of the check."""

    max_abs: float
    max_rel: float  # max_abs divided by the largest absolute value that was expected


@dataclass(frozen=True)
class Agreement:
    """How a file's answers agree with the network's.

    Attributes:
        images: how many were asked.
        same: how many got the same class; for features, which have none, all of them.
        max_distance: the largest distance of two probabilities (of two features' entries).
    """

    images: int = 0
    same: int = 0
    max_distance: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        """Of two parts of a split together."""
        distance = max(self.max_distance, other.max_distance)
        return Agreement(self.images + other.images, self.same + other.same, distance)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; ``same_class`` is a fraction."""
        share = self.same / self.images if self.images else None
        return {"images": self.images, "same_class": share, "max_distance": self.max_distance}

    def check(self, *, name: str, min_same: float = 0.999, max_distance: float = 1e-3) -> None:
        """Refuse a file that answers otherwise than its network.

        Args:
            name: of the file, for messages.
            min_same: least fraction of images that must get the same class; one may always differ.
            max_distance: most that two probabilities (entries of features) may differ by.

        Raises:
            ExportError: nothing was asked, or they differ; the message holds the numbers.
        """
        if not self.images:
            raise ExportError(f"{name}: no image was asked, expected a whole split")
        share = self.same / self.images
        odd = self.images - self.same > max(1.0, (1 - min_same) * self.images + 1e-9)
        if odd or not self.max_distance <= max_distance:
            raise ExportError(
                f"{name} does not answer as its network: the same class for {100 * share:.2f} % of "
                f"{self.images} images (expected {100 * min_same:.2f} %), largest distance of two "
                f"answers {self.max_distance:.1e} (expected {max_distance:.0e})"
            )


def compare_answers(
    expected: Array, got: Array, *, task: str = "classify", name: str = "the file"
) -> Agreement:
    """How two sets of answers to the same images agree.

    A class counts as the same where the two best of the expected probabilities are a tie: the
    class that was given has, up to ``TIE``, the largest expected probability.

    Args:
        expected, got: probabilities ``(N, K)``, or features ``(N, D)``.
        task: ``classify`` or ``embed``.
        name: of what gave ``got``, for messages.

    Raises:
        ExportError: no answers, other shapes, or numbers that are not finite.
    """
    if expected.shape != got.shape or expected.ndim != 2 or not expected.size:
        raise ExportError(f"{name}: answers of shape {got.shape}, expected {expected.shape}")
    first, second = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    for whose, values in (("its network", first), (name, second)):
        if not np.isfinite(values).all():
            raise ExportError(f"{name}: {whose} gives answers that are not finite")
    same = len(first)
    if task == "classify":
        chosen = np.take_along_axis(first, second.argmax(axis=1)[:, None], axis=1)[:, 0]
        same = int((chosen >= first.max(axis=1) - TIE).sum())
    return Agreement(len(first), same, float(np.abs(second - first).max()))


def check_onnx(
    path: str | Path,
    batches: Sequence[Array],
    expected: Sequence[Sequence[Array]],
    *,
    tolerance: float = 1e-4,
) -> Difference:
    """Run a float ONNX file with one input and compare all its outputs.

    Args:
        batches: inputs.
        expected: for each batch, the outputs in the file's order.
        tolerance: largest relative difference.

    Raises:
        ExportError: above ``tolerance``, not finite, or another number or shape of outputs.
    """
    session = open_session(path)
    name = session.get_inputs()[0].name
    max_abs = max_rel = 0.0
    for batch, wanted in zip(batches, expected, strict=True):
        got = session.run(None, {name: batch})
        shapes = [tuple(g.shape) for g in got], [tuple(w.shape) for w in wanted]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{path}: outputs have shapes {shapes[0]}, expected {shapes[1]}")
        for g, w in zip(got, wanted, strict=True):
            difference = float(np.abs(np.subtract(g, w, dtype=np.float64)).max())
            size = float(np.abs(w).max())
            relative = difference / size if size > 0 else difference
            max_abs = float(np.maximum(max_abs, difference))  # unlike max, it keeps a nan
            max_rel = float(np.maximum(max_rel, relative))
            if not max_rel <= tolerance:  # also when it is not a number
                raise ExportError(
                    f"{path}: ONNX Runtime differs by {max_rel:.2e} relative "
                    f"({max_abs:.2e} absolute), expected at most {tolerance:.0e}"
                )
    return Difference(max_abs, max_rel)
