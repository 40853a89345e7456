"""The training loop: one step function for every precision, exact accumulation, exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpkd.dataset.data_utils import SightLoader
from mpkd.model.lora import freeze_norm_statistics
from mpkd.model.networks import sight_of
from mpkd.quant.companion import Companion
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import LearningTeacher, Objective
from mpkd.trainer.settings import Settings, body_and_head, compiled, parameter_groups
from mpkd.utils.common import ALONE, Evaluation, evaluate
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.distributed import World, gather_objects, wrap
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best, StageState
from shared_core.runs import StageLog, progress

NOTHING_YET: dict[str, float] = {
    "loss": 0.0, "right": 0, "seen": 0, "grad_norm": 0.0, "normed": 0, "steps": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training, and what it reports to.

    Attributes:
        stage: its name in logs and in the state's file.
        net: what is trained.
        objective: from a batch and the net's logits to the loss.
        loader: training batches.
        validation: images that choose the best epoch, in order.
        settings, precision, log, csv, world: how, and where it is written down.
        helper: a teacher that is trained beside the net.
        companion: what else learns with the net, and adds to its loss.
        reference: a teacher's logits for the validation images, for the agreement.
        frozen_norms: batch-norm statistics stay as they are (adapters).
        labelled: whether every training image has a label; without, no training accuracy.
        score: what the best epoch has the most of; None keeps the last epoch.
        follows: the state of an earlier training of the same stage: what that wrote stays.
        start_counts: the network as it begins is the first to beat, as epoch 0.
    """

    stage: str
    net: nn.Module
    objective: Objective
    loader: SightLoader
    validation: SightLoader
    settings: Settings
    precision: Precision
    log: StageLog
    csv: MetricsLogger
    world: World = ALONE
    helper: LearningTeacher | None = None
    companion: Companion | None = None
    reference: npt.NDArray[np.float32] | None = None
    frozen_norms: bool = False
    labelled: bool = True
    score: Callable[[Evaluation], float] | None = lambda found: found.accuracy
    follows: StageState | None = None
    start_counts: bool = False


class _Both(nn.Module):
    """Student and learning teacher in one forward, so that one wrapper averages the gradients."""

    def __init__(self, net: nn.Module, helper: LearningTeacher) -> None:
        super().__init__()
        self.net, self.teacher = net, helper.teacher

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = sight_of(self.teacher).of(images, sight_of(self.net))
        return self.net(images), self.teacher(seen)


def groups_of(batches: Iterator[TorchBatch], size: int) -> Iterator[list[TorchBatch]]:
    """The batches of each step; the last step of an epoch may have fewer."""
    group: list[TorchBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
def same_everywhere(tensors: Sequence[Tensor]) -> None:
    """The main process' values in every process, each kind of number in one message."""
    for kind in sorted({str(t.dtype) for t in tensors}):
        own = [t for t in tensors if str(t.dtype) == kind]
        flat = torch.cat([t.reshape(-1) for t in own])
        dist.broadcast(flat, src=0)
        for tensor, values in zip(own, flat.split([t.numel() for t in own]), strict=True):
            tensor.copy_(values.reshape(tensor.shape))


class Trainer:
    """Trains ``job.net``; :meth:`run` goes on where an earlier process stopped.

    After a kill at any moment the weights are, on a CPU, those of a run that was never stopped:
    the state holds weights, optimizer, loss scale, averaged weights, the order's position, random
    states, the best weights so far, the sums of the epoch and the lengths of both logs.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        s = job.settings
        self.nets = [job.net] if job.helper is None else [job.net, job.helper.teacher]
        if s.channels_last:
            for net in self.nets:
                net.to(memory_format=torch.channels_last)
        groups = parameter_groups(*self.nets, weight_decay=s.weight_decay)
        if s.classes:
            groups = body_and_head(job.net, s)
        self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate)
        self.ema = Ema(job.net, decay=s.ema) if s.ema else None
        self.best = Best()
        parts: dict[str, Any] = {
            "net": job.net, "optimizer": self.optimizer, "precision": job.precision,
            "best": self.best, "order": job.loader,
        }  # fmt: skip
        if job.helper is not None:
            parts["helper"] = job.helper.teacher
        if self.ema is not None:
            parts["ema"] = self.ema
        if job.companion is not None:
            parts["companion"] = job.companion
        self.state = StageState(job.stage, parts, job.log, world=job.world, files={"csv": job.csv})
        self._forward: nn.Module | None = None
        self._total = s.total_steps(len(job.loader))
        self._step, self._epoch, self._sums = 0, 0, dict(NOTHING_YET)
        self._saved = time.monotonic()

    # -- one step ---------------------------------------------------------------------------------

    @property
    def forward(self) -> nn.Module:
        """The network as a step calls it: compiled, and averaging gradients over the processes."""
        if self._forward is None:
            job = self.job
            net = job.net
            if job.settings.compile:
                side, device = job.loader.side, job.loader.normalizer.device
                net = compiled(net, example=torch.zeros(2, 3, side, side, device=device))
            both = net if job.helper is None else _Both(net, job.helper)
            self._forward = wrap(both, job.world)
        return self._forward

    def step(self, batches: Sequence[TorchBatch], rate: float) -> dict[str, float]:
        """One optimizer step on the images of ``batches`` together.

        The loss of each batch counts by its share of the images, so that the gradient is that of
        one batch that holds them all, also when the last one is smaller. Gradients travel between
        processes once a step, with those of the last batch.

        Returns:
            Sums over the images: ``loss``, ``right``, ``seen``; ``grad_norm``, and in ``normed``
            whether there is one: not without clipping, nor in a step that overflowed.
        """
        job, s = self.job, self.job.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("relative", 1.0)
        if job.companion is not None:
            job.companion.before_step(self._step, self._total)
        total = sum(len(batch.labels) for batch in batches)
        loss_sum, right = 0.0, 0
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            with nullcontext() if last else self._alone():
                loss, logits = self._loss(batch)
                share = len(batch.labels) / total
                done = job.precision.backward_step(
                    loss[-1] * share, self.optimizer, clip=s.clip or None, update=last
                )
            loss_sum += float(loss[0].detach()) * len(batch.labels)
            right += int((logits.detach().argmax(dim=1) == batch.labels).sum())
        if job.companion is not None:
            if job.world.world_size > 1:
                for tensor in job.companion.tensors():
                    if tensor.grad is not None:
                        dist.all_reduce(tensor.grad, op=dist.ReduceOp.SUM)
                        tensor.grad.div_(job.world.world_size)
            job.companion.after_step()
        if self.ema is not None and done.stepped:
            self.ema.update(job.net)
        norm = done.grad_norm if done.stepped else None
        found = {"loss": loss_sum, "right": right, "seen": total}
        return {**found, "grad_norm": norm or 0.0, "normed": int(norm is not None)}

    def _loss(self, batch: TorchBatch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The objective, the same with what the companion adds to it, and the logits."""
        job = self.job
        if not job.settings.channels_last:
            batch = batch._replace(images=batch.images.contiguous())
        with job.precision.autocast():
            logits = self.forward(batch.images)
            if job.helper is not None:
                logits, job.helper.logits = logits
            loss = job.objective(batch, logits)
            term = None if job.companion is None else job.companion.term(job.net)
        return (loss, loss if term is None else loss + term), logits

    def _alone(self) -> AbstractContextManager[None]:
        """Within it gradients are only gathered, not yet averaged over the processes."""
        wrapped = isinstance(self.forward, nn.parallel.DistributedDataParallel)
        return self.forward.no_sync() if wrapped else nullcontext()

    # -- the whole --------------------------------------------------------------------------------

    def run(self) -> Best:
        """Train to the end. Returns the weights of the best epoch."""
        job, s = self.job, self.job.settings
        self._begin()
        while self._epoch < s.epochs and self._step < self._total:
            for net in self.nets:
                net.train()
                if job.frozen_norms:
                    freeze_norm_statistics(net)
            rate = self._steps_of_epoch()
            job.loader.loader.order.set_epoch(self._epoch + 1)  # also when the last step came early
            self._end_epoch(rate)
            self._epoch, self._sums = self._epoch + 1, dict(NOTHING_YET)
            self._save()
        return self.best

    def _begin(self) -> None:
        """Go on from the saved state, or drop what a killed try of this stage wrote."""
        job = self.job
        if self.state.restore(rewind=False):
            self._step, self._epoch = self.state.counters["step"], self.state.counters["epoch"]
            self._sums = self.state.counters["sums"]
            if self._epoch >= job.settings.epochs or self._step >= self._total:
                job.log.say(f"{job.stage}: trained before")  # what follows it wrote the rest
            else:
                self.state.rewind()
                where = f"resumed at epoch {self._epoch + 1}, step {self._step}"
                job.log.say(f"{job.stage}: {where}")
        elif job.follows is not None:
            job.follows.rewind()
        else:
            job.log.begin()
            before = (int(done.get("csv_position", 0)) for done in job.log.stages.values())
            job.csv.cut(max(before, default=0))
        if job.start_counts and job.score is not None and not self._step:
            self.best.offer(job.net, job.score(self._evaluate()), 0)
        self._saved = time.monotonic()

    def _steps_of_epoch(self) -> float:
        """The steps that are left of this epoch; the last one's learning rate."""
        job, s = self.job, self.job.settings
        per_epoch = -(-len(job.loader) // s.accumulation)
        done = job.loader.loader.order.position // s.batch_size // s.accumulation
        label, rate = f"{job.stage} epoch {self._epoch + 1}/{s.epochs}", 0.0
        groups = groups_of(iter(job.loader), s.accumulation)
        for group in progress(groups, total=per_epoch, label=label, done=done):
            rate = s.rate(self._step, total=self._total, steps_per_epoch=per_epoch)
            for name, value in self.step(group, rate).items():
                self._sums[name] += value
            self._sums["steps"] += 1
            self._step += 1
            if self._step >= self._total:
                break
            due = s.log_interval and self._step % s.log_interval == 0
            if due and self._sums["steps"] < per_epoch:
                values = {"loss": self._sums["loss"] / self._sums["seen"], "lr": rate}
                job.log.write(job.stage, "train", self._step, values)
                if self._agreed(time.monotonic() - self._saved >= s.save_seconds):
                    self._save()
        return rate

    def _save(self) -> None:
        self.state.save(step=self._step, epoch=self._epoch, sums=self._sums)
        self._saved = time.monotonic()

    def _agreed(self, mine: bool) -> bool:
        """The main process' answer, in every process: all save, or none does."""
        return gather_objects(mine, self.job.world)[0]

    def _evaluate(self) -> Evaluation:
        job = self.job
        return evaluate(job.net, job.validation, precision=job.precision, world=job.world)

    def _end_epoch(self, rate: float) -> None:
        """Validate, keep the best, write the epoch down."""
        job, sums = self.job, self._sums
        if job.world.world_size > 1:  # statistics of batch norms are each process' own
            averages = [] if self.ema is None else list(self.ema.weights.values())
            same_everywhere([b for net in self.nets for b in net.buffers()] + averages)
        with nullcontext() if self.ema is None else self.ema.applied(job.net):
            found = self._evaluate()
            score = self._epoch if job.score is None else job.score(found)
            self.best.offer(job.net, score, self._epoch + 1)
        agreement = None if job.reference is None else found.agreement(job.reference)
        scale = job.precision.scaler.get_scale() if job.precision.dtype == "fp16" else None
        seen = max(1, sums["seen"])
        values = {
            "train_loss": sums["loss"] / seen, "lr": rate,
            "train_acc": sums["right"] / seen if job.labelled else None,
            "val_loss": found.loss, "val_acc": found.accuracy, "agreement": agreement,
            "grad_norm": sums["grad_norm"] / sums["normed"] if sums["normed"] else None,
            "loss_scale": scale, "skipped_steps": job.precision.skipped_steps,
        }  # fmt: skip
        job.log.write(job.stage, "val", self._epoch + 1, values)
        row = {"stage": job.stage, "epoch": self._epoch + 1, "step": self._step, **values}
        job.csv.write({**row, "seconds": round(self.state.seconds, 3)})
        same = "" if agreement is None else f", agreement {agreement:.4f}"
        job.log.say(
            f"{job.stage}: epoch {self._epoch + 1}/{job.settings.epochs}, "
            f"loss {values['train_loss']:.4f}, validation {found.accuracy:.4f}{same}"
        )
