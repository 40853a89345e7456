"""Evaluation: every image once, gathered from all processes, and what is measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shared_core.for_torch.accuracy import Answers, answers_of
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import World
from shared_core.metrics import Confusion, TopK, classification_report
from torch_cls_zoo.applications.session import Session, criterion_of
from torch_cls_zoo.criterions import Criterion
from torch_cls_zoo.dataloader.folders import Part
from torch_cls_zoo.dataloader.loaders import eval_loader


@dataclass(frozen=True)
class Outputs:
    """What the network said of the images of a part that could be read."""

    part: Part
    answers: Answers

    @property
    def logits(self) -> np.ndarray:
        """float32 ``(N, C)``."""
        return self.answers.logits

    @property
    def labels(self) -> np.ndarray:
        """int64 ``(N,)``."""
        return self.answers.labels

    @property
    def rows(self) -> np.ndarray:
        """int64 ``(N,)``: which images of the part, rising."""
        return self.answers.rows

    @property
    def paths(self) -> list[str]:
        """Path of each row, below the data folder."""
        return [self.part.paths[row] for row in self.rows.tolist()]

    @property
    def unreadable(self) -> list[str]:
        """Paths of the images that could not be read, below the data folder."""
        return [self.part.paths[row] for row in self.answers.lost]

    @property
    def keys(self) -> list[str]:
        """Content key of each row."""
        return [str(self.part.images.keys[row]) for row in self.rows.tolist()]


def run_network(model: nn.Module, loader: TorchLoader, part: Part, world: World) -> Outputs:
    """Logits of every image, in the order of the part, the same in all processes.

    Raises:
        ValueError: no image could be read.
    """
    try:
        return Outputs(part, answers_of(model, loader, world))
    except ValueError as error:
        raise ValueError(f"{part.name}: {error}") from error


def outputs_of(session: Session, part: Part) -> Outputs:
    """Run the session's network over a part."""
    loader = eval_loader(
        part.images,
        session.settings,
        batch_size=session.batch_size,
        world=session.world,
        threads=session.config.data.workers,
    )
    return run_network(session.model, loader, part, session.world)


def loss_of(outputs: Outputs, criterion: Criterion) -> float:
    """The criterion over all images at once, so that it does not depend on batches; nats."""
    was_training = criterion.training
    criterion.eval()
    device = next((b.device for b in criterion.buffers()), torch.device("cpu"))
    with torch.inference_mode():
        loss = criterion(
            torch.from_numpy(outputs.logits).to(device), torch.from_numpy(outputs.labels).to(device)
        )
    criterion.train(was_training)
    return float(loss)


def probabilities_of(outputs: Outputs, criterion: Criterion) -> np.ndarray:
    """Softmax or sigmoid of the logits, as the criterion means them: float32 ``(N, C)``."""
    return criterion.probabilities(torch.from_numpy(outputs.logits)).numpy()


def measure(outputs: Outputs, criterion: Criterion, *, num_classes: int) -> dict[str, Any]:
    """Numbers of an evaluation; accuracies are fractions in [0, 1].

    Returns:
        ``accuracy``, ``top5`` (with more than five classes), ``macro_f1``, ``loss``, ``images``,
        ``unreadable``, and ``confusion`` (rows: true classes).
    """
    finite = bool(np.isfinite(outputs.logits).all())
    if not finite:
        raise ValueError(f"{outputs.part.name}: the network's outputs are not finite")
    ks = (1, 5) if num_classes > 5 else (1,)
    top, confusion = TopK(ks), Confusion(num_classes)
    top.update(outputs.logits, outputs.labels)
    confusion.update(outputs.logits, outputs.labels)
    matrix = confusion.result()
    report = classification_report(matrix, output_dict=True)
    found = top.result()
    values: dict[str, Any] = {
        "accuracy": found[1],
        "macro_f1": report["macro avg"]["f1-score"],
        "loss": loss_of(outputs, criterion),
        "images": len(outputs.rows),
        "unreadable": len(outputs.unreadable),
        "confusion": matrix.tolist(),
    }
    if 5 in found:
        values["top5"] = found[5]
    return values


def plain_criterion(session: Session) -> Criterion:
    """The family's loss without weights: what losses of different runs compare by."""
    return criterion_of(session, plain=True)
