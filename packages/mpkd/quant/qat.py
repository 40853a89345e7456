"""Quantization-aware training: weights and scales learn together, from the teacher's answers.

``QatRun`` holds everything that changes (network, optimizer, schedule, step) and can be saved and
restored at any step. ``step`` is the one step function; ``train`` walks over the epochs.

Source: Esser et al. 2020, arXiv:1902.08153 (learned scales); Bhalgat et al. 2020, arXiv:2004.09576
    (learned offsets); Mishra and Marr 2018, arXiv:1711.05852, scheme C (a trained network is
    quantized and learns on at a small rate from its teacher).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpkd.trainer.distillation_loss import DistillationLoss, MixedLoss, apprentice_loss

Batches = Callable[[int], Iterable[Any]]
MODES = ("teacher_only", "labels", "mixed", "apprentice_a", "apprentice_b", "apprentice_c")


class Saved(Protocol):
    """Where a run's state is kept, as :class:`shared_core.for_torch.run_state.StageState`."""

    counters: dict[str, Any]

    def restore(self) -> bool:
        """Put back what was saved; False where there is nothing."""
        ...

    def save(self, **counters: Any) -> None:
        """Write everything."""
        ...

    def remove(self) -> None:
        """Nothing is needed any more."""
        ...


class QatLoss:
    """What a quantized student loses, by the names of ``distillation.mode``.

    Args:
        mode: one of ``MODES``. ``teacher_only`` never looks at labels; ``labels`` never at the
            teacher.
        loss: one of :data:`mpkd.trainer.distillation_loss.LOSSES`.
        temperature: of the distillation.
        alpha: share of the distillation in mode ``mixed``.

    Raises:
        ValueError: an unknown mode, or what the distillation loss refuses.
    """

    def __init__(
        self,
        mode: str = "teacher_only",
        *,
        loss: str = "kl",
        temperature: float = 4.0,
        alpha: float = 0.7,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"distillation mode {mode!r}: expected one of {', '.join(MODES)}")
        self.mode = mode
        needs = mode in ("teacher_only", "mixed")
        self.distillation = DistillationLoss(loss, temperature=temperature) if needs else None
        self.alpha = alpha if mode == "mixed" else 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether teacher outputs enter."""
        return self.mode != "labels" and not (self.mode == "mixed" and self.alpha == 0)

    @property
    def needs_labels(self) -> bool:
        """Whether labels enter."""
        return self.mode != "teacher_only"

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """Scalar; logits ``(N, C)``, labels int64 ``(N,)``.

        Raises:
            ValueError: what the mode needs is not there.
        """
        if self.needs_teacher and teacher is None:
            raise ValueError(f"no teacher, expected one: distillation mode is {self.mode}")
        if self.needs_labels and labels is None:
            raise ValueError(f"no labels, expected some: distillation mode is {self.mode}")
        if self.mode == "teacher_only":
            return self.distillation(student, teacher)
        if self.mode.startswith("apprentice"):
            both = self.mode == "apprentice_a"
            return apprentice_loss(student, teacher, labels, train_teacher=both)
        distillation = self.distillation or DistillationLoss("kl", temperature=1.0)
        return MixedLoss(distillation, alpha=self.alpha)(student, teacher, labels)


def learned_scales(net: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of the quantisers that get gradients."""
    return [p for n, p in net.named_parameters() if "_quantizer." in n and p.requires_grad]


class QatRun:
    """One training of a quantized network, that can stop and go on at any step.

    Args:
        net: quantized with ``learned=True``, calibrated. Trained in place.
        loss: see :class:`QatLoss`.
        steps: in all; the rate falls to 0 along a cosine.
        learning_rate: of Adam for the weights; scales learn at a tenth of it, without decay.
        weight_decay: of the weights.
        teacher: images to logits; not called where a batch brings its teacher outputs. In mode
            ``apprentice_a`` it learns too.
        extra: adds a term to the loss, given the network: a regulariser.
        clip: largest gradient norm; 0 = no limit.

    Raises:
        ValueError: no steps.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: QatLoss,
        *,
        steps: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        teacher: nn.Module | None = None,
        extra: Callable[[nn.Module], Tensor] | None = None,
        clip: float = 1.0,
    ) -> None:
        if steps < 1:
            raise ValueError(f"{steps} training steps, expected at least 1")
        self.net, self.loss, self.teacher = net, loss, teacher
        self.steps, self.extra, self.clip = steps, extra, clip
        scales = learned_scales(net)
        own = {id(p) for p in scales}
        weights = [p for p in net.parameters() if p.requires_grad and id(p) not in own]
        self.trains_teacher = loss.mode == "apprentice_a" and teacher is not None
        if self.trains_teacher:
            weights += [p for p in teacher.parameters() if p.requires_grad]
        groups = [{"params": weights, "lr": learning_rate, "weight_decay": weight_decay}]
        if scales:
            groups.append({"params": scales, "lr": 0.1 * learning_rate, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        )
        self.done = 0  # steps so far

    def teach(self, images: Tensor) -> Tensor | None:
        """The teacher's logits, or None where the loss has no use for them."""
        if not self.loss.needs_teacher or self.teacher is None:
            return None
        if self.trains_teacher:
            return self.teacher.train()(images)
        with torch.no_grad():
            return self.teacher.eval()(images)

    def step(
        self, images: Tensor, labels: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> dict[str, float]:
        """One update of weights and scales; the parts of the loss.

        Args:
            images: ``(N, 3, H, W)``.
            labels: int64 ``(N,)``; not looked at in mode ``teacher_only``.
            teacher_logits: ``(N, C)`` kept from before; None asks the teacher.
        """
        self.net.train()
        taught = self.teach(images) if teacher_logits is None else teacher_logits
        main = self.loss(self.net(images), taught, labels)
        total = main if self.extra is None else main + self.extra(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.clip:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return {"loss": float(main.detach()), "total": float(total.detach())}

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "done": self.done,
        }
        if self.trains_teacher:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = int(state["schedule"]["last_epoch"])
        self.done = int(state["done"])
        if self.trains_teacher:
            self.teacher.load_state_dict(state["teacher"])


def unpack(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, labels and teacher outputs of a batch; the last two may be missing."""
    if isinstance(batch, Tensor):
        return batch, None, None
    images, labels, logits = (*batch, None, None)[:3]
    return images, labels, logits


def train(
    run: QatRun,
    batches: Batches,
    *,
    epochs: int,
    steps_an_epoch: int,
    saved: Saved | None = None,
    save_every: int = 0,
    after: Callable[[int, dict[str, float]], None] | None = None,
) -> QatRun:
    """Walk over the epochs, going on from ``saved`` where it holds something.

    Args:
        batches: by epoch; the same epoch gives the same batches in the same order.
        epochs: in all.
        steps_an_epoch: batches in an epoch.
        saved: state of this run, written after each epoch and every ``save_every`` steps.
        after: called after each epoch with its number and the mean loss of its steps.

    Returns:
        ``run``, its network in evaluation mode.

    Raises:
        ValueError: an epoch without batches.
    """
    sums = {"loss": 0.0, "total": 0.0}
    if saved is not None and saved.restore():
        sums = dict(saved.counters.get("sums", sums))
    first = run.done // steps_an_epoch
    for epoch in range(first, epochs):
        begin = run.done - epoch * steps_an_epoch
        for index, batch in enumerate(batches(epoch)):
            if index < begin:
                continue  # done before the stop
            if index >= steps_an_epoch:
                break
            for name, value in run.step(*unpack(batch)).items():
                sums[name] += value
            if saved is not None and save_every and run.done % save_every == 0:
                saved.save(sums=sums)
        if run.done < (epoch + 1) * steps_an_epoch:
            raise ValueError(
                f"epoch {epoch} had {run.done - epoch * steps_an_epoch} batches, expected "
                f"{steps_an_epoch}"
            )
        means = {name: total / steps_an_epoch for name, total in sums.items()}
        sums = dict.fromkeys(sums, 0.0)
        if after is not None:
            after(epoch, means)
        if saved is not None:
            saved.save(sums=sums)
    run.net.eval()
    return run
