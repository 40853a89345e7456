"""One epoch of training: the batch, its targets, the step; and the sums that are reported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.for_torch.data import TorchBatch, TorchLoader
from shared_core.for_torch.distributed import World, accumulating, unwrap
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.precision import Precision
from torch_cls_zoo.criterions import Criterion
from torch_cls_zoo.dataloader.batch_ops import BatchOps, mixed_targets, permuted
from torch_cls_zoo.optim import Schedule


@dataclass
class Targets:
    """What the training learns from, by number of the image."""

    soft: Tensor | None = None  # float (N, C) of teachers; None for the labels
    weights: Tensor | None = None  # float (N,) of a curriculum; None for 1


@dataclass
class Sums:
    """What an epoch adds up; whole numbers and float64, so that a resumed one goes on exactly.

    Loss and hits stay on the device, so that no step waits for it, until :meth:`settle`.
    """

    loss: Any = 0.0  # nats times images: a number, or a float64 scalar
    hits: Any = 0
    images: int = 0
    batches: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, loss: Tensor, hits: Tensor, images: int) -> None:
        """One batch: its mean loss and the images that were right, both scalars."""
        self.loss = self.loss + loss.double() * images
        self.hits = self.hits + hits
        self.images += images
        self.batches += 1

    def settle(self) -> None:
        """Fetch the numbers from the device.

        Raises:
            ValueError: the loss is not finite.
        """
        self.loss, self.hits = float(self.loss), int(self.hits)
        if not math.isfinite(self.loss):
            raise ValueError(
                f"the loss is {self.loss} at or before batch {self.batches} of the epoch, expected "
                "a finite one: lower --lr or use --amp bf16 or fp32"
            )

    def plain(self) -> dict[str, Any]:
        """Plain JSON, after :meth:`settle`."""
        return asdict(self)

    def mean_loss(self) -> float:
        """Nats an image."""
        return float(self.loss) / max(self.images, 1)

    def accuracy(self) -> float:
        """Fraction in [0, 1], against the labels (of the larger share where batches are mixed)."""
        return float(self.hits) / max(self.images, 1)


@dataclass
class Learner:
    """Everything that one training step touches."""

    model: nn.Module  # wrapped where there are several processes
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    precision: Precision
    ops: BatchOps
    targets: Targets
    world: World
    num_classes: int
    mix_targets: bool = False
    clip: float | None = None  # largest norm of the gradient
    freeze_bn: bool = False  # batch norms keep their means and variances
    accumulate: int = 1  # batches of a step
    ema: Ema | None = None  # of the weights

    def train(self) -> None:
        """Into training mode, all but the statistics that are to stay."""
        self.model.train()
        self.criterion.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                closed = module.affine and not module.weight.requires_grad
                module.train(not (self.freeze_bn or closed))

    def step(
        self, batch: TorchBatch, number: int, *, gathered: int = 1, update: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Learn from batch ``number`` of the run; the device is not waited for.

        Args:
            gathered: batches whose mean gradient makes an update.
            update: this is the last of them.

        Returns:
            Its loss in nats, and how many images were right before the update; both scalars.
        """
        with accumulating(self.model, last=update):
            loss, logits, labels = self._forward(batch, number)
            scaled = loss / gathered
            done = self.precision.backward_step(
                scaled, self.optimizer, clip=self.clip, update=update
            )
        if self.ema is not None and done.stepped:
            self.ema.update(unwrap(self.model))
        hits = (logits.detach().argmax(dim=1) == labels).sum()
        return loss.detach(), hits

    def _forward(self, batch: TorchBatch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits ``(N, C)``, and the labels by which hits are counted ``(N,)``."""
        plan = self.ops.draw(number, len(batch.labels), rank=self.world.rank)
        images = self.ops.apply(batch.images, plan)
        goals, weights = self._goals(batch), self._weights(batch)
        with self.precision.autocast():
            logits = self.model(images)
            if plan.mix is None:
                loss = self.criterion(logits, goals, sample_weights=weights)
            elif self.mix_targets:
                mixed = mixed_targets(goals, plan.mix, num_classes=self.num_classes)
                loss = self.criterion(logits, mixed, sample_weights=weights)
            else:
                other = permuted(goals, plan.mix)
                own = self.criterion(logits, goals, sample_weights=weights)
                theirs = self.criterion(logits, other, sample_weights=weights)
                loss = plan.mix.lam * own + (1 - plan.mix.lam) * theirs
        labels = batch.labels
        if plan.mix is not None and plan.mix.lam < 0.5:
            labels = permuted(labels, plan.mix)
        return loss, logits, labels

    def _goals(self, batch: TorchBatch) -> Tensor:
        if self.targets.soft is None:
            return batch.labels
        return self.targets.soft[batch.indices].to(self.world.device)

    def _weights(self, batch: TorchBatch) -> Tensor | None:
        if self.targets.weights is None:
            return None
        return self.targets.weights[batch.indices].to(self.world.device)


def run_epoch(
    learner: Learner, loader: TorchLoader, sums: Sums, *, first_number: int, schedule: Schedule
) -> Iterator[Sums]:
    """The rest of the loader's epoch; yields the sums after each batch.

    Args:
        sums: of the epoch so far; added to.
        first_number: number, in the run, of the epoch's first batch.
        schedule: sets the rate before each step.
    """
    learner.train()
    seen, total = len(loader.loader.skipped), len(loader)
    for batch in loader:
        at = sums.batches
        first = at - at % learner.accumulate  # of the batches that make a step together
        last = min(first + learner.accumulate, total)
        schedule.set_step(first_number + at)
        loss, hits = learner.step(
            batch, first_number + at, gathered=last - first, update=at + 1 == last
        )
        sums.add(loss, hits, len(batch.labels))
        new = loader.loader.skipped[seen:]
        seen += len(new)
        sums.unreadable += [item.name for item in new if item.name not in sums.unreadable]
        yield sums
