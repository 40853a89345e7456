"""Fine-tune a GFNet: AdamW with warm-up and cosine, mixup or cutmix, EMA, exact resume.

The same loop trains the backbone (cross-entropy) and the student (distillation): only the
:class:`Task`, which turns a batch into losses, differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.scene_views import TaughtBatch, TurnedLoader
from gfnet_dynn.settings import FineTuning
from gfnet_dynn.train.parallel import ALONE
from shared_core.datasets.views.mixing import Mix, draw_cutmix, draw_mixup
from shared_core.for_torch.accuracy import answers_of
from shared_core.for_torch.data import TorchBatch, TorchLoader
from shared_core.for_torch.distributed import World, wrap
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.mixing import cutmix, mix_targets, mixup, one_hot
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best, StageState
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import StageLog, derive_seed, progress

BARELY_TRAIN = 21  # batches of an epoch under --barely_train
CHECK_EVERY = 50  # steps between two looks whether the loss is finite: each waits for the GPU


class Task(nn.Module):
    """A network and what it learns from a batch; whatever else learns with it is a part of this.

    Attributes:
        model: the network that is kept.
    """

    model: nn.Module

    def forward(
        self, images: Tensor, targets: Tensor, epoch: float, answers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Named losses, ``loss`` among them, in nats.

        Args:
            images: ``(N, 3, H, W)``.
            targets: int64 ``(N,)``, or class shares ``(N, K)``.
            epoch: counted from 1.
            answers: ``(N, K)``, a teacher's stored logits of these images, where there are some.
        """
        raise NotImplementedError


class PlainTask(Task):
    """Cross-entropy with label smoothing (a fraction in [0, 1))."""

    def __init__(self, model: nn.Module, *, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(
        self, images: Tensor, targets: Tensor, epoch: float, answers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy; see :class:`Task`."""
        logits = self.model(images).float()
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.smoothing)}


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a straight rise, then a cosine to a hundredth."""

    base: float
    total_steps: int
    warmup_steps: int

    def at(self, step: int) -> float:
        """Rate of the step with number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.base * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        floor = self.base / 100
        return floor + (self.base - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def parameter_groups(
    module: nn.Module, *, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict]:
    """Decay matrices and filters, not biases, norms and positions (``pos_embed``).

    Args:
        rates: by the beginning of a parameter's name, how many times the base rate it learns at.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            flat = parameter.ndim <= 1 or name.endswith("pos_embed")
            rate = next((r for start, r in (rates or {}).items() if name.startswith(start)), 1.0)
            groups.setdefault((0.0 if flat else weight_decay, rate), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate": rate}
        for (decay, rate), parameters in sorted(
            groups.items(), key=lambda one: one[0], reverse=True
        )
    ]


def draw_mix(settings: FineTuning, *, stage: str, step: int, batch: int, size: int) -> Mix | None:
    """Mixup or cutmix of one step, half of the steps each when both are on; None without."""
    if not settings.mixup and not settings.cutmix:
        return None
    rng = np.random.default_rng(derive_seed(settings.seed, stage, "mix", step))
    if settings.cutmix and (not settings.mixup or rng.random() < 0.5):
        return draw_cutmix(rng, batch, alpha=settings.cutmix, height=size, width=size)
    return draw_mixup(rng, batch, alpha=settings.mixup)


def apply_mix(
    mix: Mix | None, images: Tensor, labels: Tensor, *, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mixed images, and targets: class numbers without a mix, class shares ``(N, K)`` with one."""
    if mix is None:
        return images, labels
    shares = mix_targets(
        one_hot(labels, num_classes=num_classes), lam=mix.lam, permutation=mix.permutation
    )
    if mix.box is None:
        return mixup(images, lam=mix.lam, permutation=mix.permutation), shares
    return cutmix(images, box=mix.box, permutation=mix.permutation), shares


class Means:
    """Means of the losses of an epoch; sums stay on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of one step in."""
        for name, value in losses.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def state(self) -> dict[str, float]:
        """The sums as plain numbers."""
        return {name: float(value) for name, value in self.sums.items()}

    def load(self, state: dict[str, float], device: torch.device) -> None:
        """Go on from ``state``."""
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in state.items()
        }


class FineTune:
    """One stage of fine-tuning: :meth:`run` trains and keeps the weights that do best.

    Args:
        stage: its name in logs, seeds and the state file.
        task: the network with its losses.
        loader, validation: batches to learn from, and those that choose the epoch.
        num_classes, image_size: of the data; pixels.
        epochs, base_lr: of this stage.
        settings: what the stages have in common.
        rates: of parts of the task, see :func:`parameter_groups`.
        started: the network knows the classes already; no epoch below it is kept.
        world: the processes that train together; a metric of the training is of this one's share.
    """

    def __init__(
        self,
        stage: str,
        task: Task,
        *,
        loader: TorchLoader | TurnedLoader,
        validation: TorchLoader,
        num_classes: int,
        image_size: int,
        epochs: int,
        base_lr: float,
        precision: Precision,
        settings: FineTuning,
        log: StageLog,
        world: World = ALONE,
        rates: Mapping[str, float] | None = None,
        started: bool = False,
    ) -> None:
        self.stage, self.task, self.model = stage, task, task.model
        self.loader, self.validation = loader, validation
        self.num_classes, self.image_size = num_classes, image_size
        self.epochs, self.precision, self.settings = epochs, precision, settings
        self.log, self.world, self.started = log, world, started
        self.learner = wrap(task, world)
        if world.rank:  # all began with the same weights; from here each draws its own noise
            seed_all(derive_seed(settings.seed, stage, "rank", world.rank) % 2**32)
        groups = parameter_groups(task, weight_decay=settings.finetune_wd, rates=rates)
        self.optimizer = torch.optim.AdamW(groups, lr=base_lr)
        self.ema = Ema(task.model, decay=settings.ema) if settings.ema else None
        self.best, self.means, self.step = Best(), Means(), 0
        self.steps = min(len(loader), BARELY_TRAIN) if settings.barely_train else len(loader)
        warmup = min(settings.finetune_warmup, epochs - 1)
        self.schedule = Schedule(base_lr, epochs * self.steps, warmup * self.steps)
        parts = {
            "task": task,
            "optimizer": self.optimizer,
            "precision": precision,
            "loader": loader,
            "best": self.best,
        }
        if self.ema is not None:
            parts["ema"] = self.ema
        self.state = StageState(stage, parts, log, world=world)

    def run(self) -> Best:
        """Train from the start, or from the state of a killed try. Returns the best weights."""
        first = 0
        if self.state.restore():
            first, self.step = self.state.counters["epoch"], self.state.counters["step"]
            self.means.load(self.state.counters["sums"], self.precision.device)
            self.log.say(f"{self.stage}: resumed at epoch {first + 1}, step {self.step}")
        else:
            if self.started:
                self._offer(-1)
                self.log.say(f"{self.stage}: starts at {self.best.accuracy:.4f}")
            self._save(0)
        for epoch in range(first, self.epochs):
            self._train_epoch(epoch)
            self._judge_epoch(epoch)
            self._save(epoch + 1)
        return self.best

    def _save(self, epoch: int) -> None:
        self.state.save(epoch=epoch, step=self.step, sums=self.means.state())

    def _train_epoch(self, epoch: int) -> None:
        """What is left of an epoch."""
        self.task.train()
        settings, done = self.settings, self.step - epoch * self.steps
        for batch in self._batches(epoch, done):
            self._step(batch, epoch)
            done += 1
            if self.step % CHECK_EVERY == 0 or done == self.steps:
                self._check_finite(epoch)
            if done == self.steps:
                if done < len(self.loader):
                    break
            elif settings.save_every and self.step % settings.save_every == 0:
                self._check_finite(epoch)
                self._save(epoch)
        if self.loader.loader.order.epoch == epoch:  # the last batches were left out
            self.loader.loader.order.set_epoch(epoch + 1)

    def _batches(self, epoch: int, done: int) -> Iterator[TorchBatch | TaughtBatch]:
        label = f"{self.stage} epoch {epoch + 1}/{self.epochs}"
        return iter(progress(self.loader, total=self.steps, done=done, label=label))

    def _step(self, batch: TorchBatch | TaughtBatch, epoch: int) -> None:
        """Forward, losses, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.schedule.at(self.step)
        mix = draw_mix(
            self.settings,
            stage=self.stage,
            step=self.step,
            batch=len(batch.labels),
            size=self.image_size,
        )
        images, targets = apply_mix(mix, batch.images, batch.labels, num_classes=self.num_classes)
        answers = getattr(batch, "answers", None)
        with self.precision.autocast():
            losses = self.learner(images, targets, epoch + 1, answers)
        clip = self.settings.clip_grad or None
        self.precision.backward_step(losses["loss"], self.optimizer, clip=clip)
        if self.ema is not None:
            self.ema.update(self.model)
        self.means.add(losses)
        self.step += 1

    def _check_finite(self, epoch: int) -> None:
        if not math.isfinite(float(self.means.sums["loss"])):
            raise ValueError(
                f"{self.stage}: the loss is not finite at step {self.step}, epoch {epoch + 1}; "
                "a lower learning rate or --amp fp32 may help"
            )

    def _judge_epoch(self, epoch: int) -> None:
        """Accuracy on the validation split; the best weights are kept."""
        means = {name: value / self.steps for name, value in self.means.state().items()}
        rate = self.schedule.at(self.step - 1)
        self.log.write(self.stage, "train", epoch, {**means, "lr": rate})
        if self.ema is None:
            found = self._offer(epoch)
        else:
            with self.ema.applied(self.model):
                found = self._offer(epoch)
        self.log.write(self.stage, "val", epoch, {"acc": found})
        self.log.say(
            f"{self.stage}: epoch {epoch + 1}/{self.epochs}, loss {means['loss']:.4f}, "
            f"calibration accuracy {found:.4f} (best {self.best.accuracy:.4f})"
        )
        self.means = Means()

    def _offer(self, epoch: int) -> float:
        said = answers_of(self.model, self.validation, self.world, precision=self.precision)
        found = said.accuracy
        self.best.offer(self.model, found, epoch)
        return found
