"""Views of whole scenes: turned and mirrored, shifted a little, and with what a teacher said.

A scene from above has no upside: its eight turns and mirror images (the dihedral group) are equally
likely pictures. A network that is told the teacher's answer to the very view that it sees learns
from the teacher alone; eight views an image are few enough to ask the teacher each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_core.datasets.views.augment import EvalView, Plan
from shared_core.for_torch.data import TorchLoader

ALL_TURNS = (0, 1, 2, 3, 4, 5, 6, 7)  # from 4 on mirrored first; then number % 4 quarter turns
MIRRORED = (0, 4)  # for images with an upside


def turn_pixels(image: np.ndarray, turn: int) -> np.ndarray:
    """Image ``(H, H, C)`` mirrored left to right from turn 4 on, then turned counter-clockwise."""
    return np.rot90(image[:, ::-1] if turn >= 4 else image, turn % 4)


def turn_images(images: Tensor, turns: Tensor) -> Tensor:
    """Each of ``(N, C, H, H)`` as :func:`turn_pixels` does with its own of ``turns``, int (N,)."""
    turned = torch.empty_like(images)
    for turn in turns.unique().tolist():
        rows = (turns == turn).nonzero()[:, 0].to(images.device)
        part = images[rows]
        part = part.flip(3) if turn >= 4 else part
        turned[rows] = torch.rot90(part, turn % 4, (2, 3))
    return turned


class ShiftedView(EvalView):
    """The view of evaluation, shifted by up to an eighth of its side, mirrored at the edges, and
    turned: what a trained network is fine-tuned on.

    Args:
        size: of the square result, pixels.
        turns: which are drawn, each as likely.
        seed: of all views.
        more: see ``EvalView``.
    """

    def __init__(self, size: int, *, turns: tuple[int, ...], seed: int, **more: object) -> None:
        super().__init__(size, **more)  # type: ignore[arg-type]
        self.turns, self.seed, self.margin = turns, seed, size // 8

    def finish(
        self, image: np.ndarray, plan: Plan, rng: np.random.Generator | None, out: np.ndarray
    ) -> None:
        """Write the view of ``image`` to ``out``, uint8 ``(H, H, 3)``."""
        super().finish(image, plan, rng, out)
        assert rng is not None
        top, left = rng.integers(0, 2 * self.margin + 1, 2)
        border = ((self.margin, self.margin), (self.margin, self.margin), (0, 0))
        wide = np.pad(out, border, mode="reflect")
        shifted = wide[top : top + out.shape[0], left : left + out.shape[1]]
        out[...] = turn_pixels(shifted, self.turns[int(rng.integers(len(self.turns)))])


class TaughtBatch(NamedTuple):
    """A batch of turned images on its device."""

    images: Tensor  # (N, 3, H, H), normalised
    labels: Tensor  # int64 (N,)
    indices: Tensor  # int64 (N,), on the CPU
    turns: Tensor  # int64 (N,), on the CPU
    answers: Tensor | None  # (N, K), the teacher's logits of these very views


class TurnedLoader:
    """Batches of a loader, every image in another turn each epoch, all of them in turn.

    Args:
        batches: views of evaluation, in an order of training.
        turns: that are shown.
        seed: of each image's first turn.
        answers: float32 ``(images, turns, K)``: the teacher's logits; None is taught by labels.
    """

    def __init__(
        self,
        batches: TorchLoader,
        *,
        turns: tuple[int, ...],
        seed: int,
        answers: np.ndarray | None = None,
    ) -> None:
        self.batches, self.turns = batches, torch.tensor(turns)
        number = len(batches.loader.image_set)
        first = np.random.default_rng(seed).integers(0, len(turns), number)
        self.first = torch.from_numpy(first)
        self.answers = None if answers is None else torch.from_numpy(answers)

    @property
    def loader(self):  # type: ignore[no-untyped-def]
        """The loader below, with the order and its position."""
        return self.batches.loader

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TaughtBatch]:
        epoch = self.loader.order.epoch
        for batch in self.batches:
            places = (self.first[batch.indices] + epoch) % len(self.turns)
            turns = self.turns[places]
            answers = None
            if self.answers is not None:
                answers = self.answers[batch.indices, places].to(batch.images.device)
            images = turn_images(batch.images, turns)
            yield TaughtBatch(images, batch.labels, batch.indices, turns, answers)

    def state_dict(self) -> dict[str, object]:
        """See ``BatchLoader.state_dict``."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """See ``BatchLoader.load_state_dict``."""
        self.batches.load_state_dict(state)
