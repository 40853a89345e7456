"""``--visual_data``: class activation maps of a part's images, and one sheet of them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.for_torch.checkpoints import unwrap
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.dataloader.folders import Part, part
from torch_cls_zoo.explain.overlays import visualise

BATCH = 8  # images; maps need the gradients of a whole batch


def visualize(session: Session) -> dict[str, Any]:
    """Draw into ``visual_images/`` of the run, by the main process."""
    asked = session.config.pictures
    name = str(asked.visual_data)
    chosen = part(session.data, name)
    rows = np.arange(len(chosen))
    if asked.visual_number and asked.visual_number < len(chosen):
        # Evenly spread: parts are listed class by class.
        rows = np.linspace(0, len(chosen) - 1, asked.visual_number).round().astype(int)

    def write() -> dict[str, Any]:
        return visualise(
            unwrap(session.model),
            _batches(session, chosen, rows),
            session.output / "visual_images",
            class_names=session.classes,
            normalise=session.settings.normalizer(session.world.device),
            method=asked.visual_method,
            layer=asked.visual_layer,
            family=session.family,
            title=f"{session.arch}, {name} images",
        )

    drawn = session.only_main(write)
    for note in drawn["notes"]:
        session.say(f"note: {note}")
    session.say(
        f"{', '.join(drawn['methods'])} of {drawn['images']} {name} images at layer "
        f"{drawn['layer']}: {drawn['sheet']}"
    )
    return drawn


def _batches(
    session: Session, chosen: Part, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, list[int | None], list[str]]]:
    view = LetterboxView(session.settings.size)
    for first in range(0, len(rows), BATCH):
        now = rows[first : first + BATCH].tolist()
        images = np.stack([view(chosen.images.image(row)) for row in now])
        labels: list[int | None] = [int(chosen.images.labels[row]) for row in now]
        yield images, labels, [chosen.paths[row] for row in now]
