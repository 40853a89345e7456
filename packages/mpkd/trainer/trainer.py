"""The training loop: one step function for every precision, exact accumulation, exact resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpkd.model.lora import freeze_norm_statistics
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import Objective
from mpkd.trainer.settings import Settings, compiled, parameter_groups
from mpkd.utils.common import ALONE, Evaluation, evaluate
from shared_core.for_torch.checkpoints import load_run_state, save_run_state
from shared_core.for_torch.data import TorchBatch, TorchLoader
from shared_core.for_torch.distributed import World, gather_objects
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best, StageState
from shared_core.for_torch.seeds import capture_rng
from shared_core.runs import StageLog, progress


@dataclass
class Job:
    """One training, and what it reports to.

    Attributes:
        stage: its name in logs and in the state's file.
        net: what is trained.
        objective: from a batch and the net's logits to the loss.
        loader: training batches.
        validation: images that choose the best epoch, in order.
        settings, precision, log, csv, world: how, and where it is written down.
        helper: what is trained beside the net and is not part of it (a learning teacher).
        reference: a teacher's logits for the validation images, for the agreement.
        frozen_norms: batch-norm statistics stay as they are (adapters).
        labelled: whether every training image has a label; without, no training accuracy.
        score: what the best epoch has the most of; accuracy on the validation images by default.
    """

    stage: str
    net: nn.Module
    objective: Objective
    loader: TorchLoader
    validation: TorchLoader
    settings: Settings
    precision: Precision
    log: StageLog
    csv: MetricsLogger
    world: World = ALONE
    helper: nn.Module | None = None
    reference: npt.NDArray[np.float32] | None = None
    frozen_norms: bool = False
    labelled: bool = True
    score: Callable[[Evaluation], float] | None = None

    def validation_size(self) -> int:
        """Images of the validation set, over all processes."""
        return len(self.validation.loader.image_set)


class SharedState(StageState):
    """A stage's state with the CSV's position, written once for all processes of a run."""

    def __init__(self, job: Job, parts: dict[str, Any]) -> None:
        super().__init__(job.stage, parts, job.log)
        self.world, self.csv = job.world, job.csv

    def restore(self) -> bool:
        """Go on from the saved state if there is one."""
        if not self.path.exists():
            return False
        self.counters = load_run_state(self.path, self.parts, rank=self.world.rank)
        position, csv = self.counters.pop("log_position"), self.counters.pop("csv_position")
        if self.world.is_main:
            self.log.metrics.cut(position)
            self.csv.cut(csv)
        self._seconds, self._since = self.counters.pop("seconds"), time.monotonic()
        return True

    def save(self, **counters: Any) -> None:
        """Write everything; the random states of all processes, the rest of the main one."""
        rng = gather_objects(capture_rng(), self.world)
        self.counters = counters
        if self.world.is_main:
            where = {
                "log_position": self.log.metrics.position(),
                "csv_position": self.csv.position(),
                "seconds": self.seconds,
            }
            save_run_state(self.path, self.parts, counters={**counters, **where}, rng=rng)

    def remove(self) -> None:
        """The stage is finished and its result is elsewhere."""
        if self.world.is_main:
            super().remove()


def average_gradients(nets: Sequence[nn.Module], world: World) -> None:
    """Every gradient becomes the mean over the processes; called once a step.

    A hook on each parameter would average every batch of an accumulated step.
    """
    for net in nets:
        for parameter in net.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world.world_size)


def share_buffers(nets: Sequence[nn.Module]) -> None:
    """Every process gets the main one's batch-norm statistics, as in DistributedDataParallel."""
    for net in nets:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


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


class Trainer:
    """Trains ``job.net``; :meth:`run` goes on where an earlier process stopped.

    After a kill at any moment the weights are, on a CPU, those of a run that was never stopped:
    the state holds weights, optimizer, loss scale, averaged weights, the order's position, random
    states, the best weights so far, the sums of the epoch and the lengths of both logs.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        s = job.settings
        self.nets = [job.net] if job.helper is None else [job.net, job.helper]
        if s.channels_last:
            for net in self.nets:
                net.to(memory_format=torch.channels_last)
        groups = parameter_groups(*self.nets, weight_decay=s.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=s.learning_rate)
        self.ema = Ema(job.net, decay=s.ema) if s.ema else None
        self.best = Best()
        parts: dict[str, Any] = {
            "net": job.net, "optimizer": self.optimizer, "precision": job.precision,
            "best": self.best, "order": job.loader,
        }  # fmt: skip
        if job.helper is not None:
            parts["helper"] = job.helper
        if self.ema is not None:
            parts["ema"] = self.ema
        self.state = SharedState(job, parts)
        self.forward: nn.Module = job.net

    # -- one step ---------------------------------------------------------------------------------

    def step(self, batches: Sequence[TorchBatch], rate: float) -> dict[str, float]:
        """One optimizer step on the images of ``batches`` together.

        The loss of each batch counts by its share of the images, so that the gradient is that of
        one batch that holds them all, also when the last one is smaller.

        Returns:
            Sums over the images: ``loss``, ``right``, ``seen``; and ``grad_norm`` (nan without
            clipping).
        """
        job, s = self.job, self.job.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("relative", 1.0)
        total = sum(len(batch.labels) for batch in batches)
        loss_sum, right, norm = 0.0, 0, None
        for number, batch in enumerate(batches):
            images = batch.images if s.channels_last else batch.images.contiguous()
            batch = batch._replace(images=images)
            with job.precision.autocast():
                logits = self.forward(images)
                loss, _ = job.objective(batch, logits)
            share = len(batch.labels) / total
            last = number + 1 == len(batches)
            if last and job.world.world_size > 1:
                job.precision.backward_step(loss * share, self.optimizer, update=False)
                average_gradients(self.nets, job.world)
                # The gradients are whole: the step is one on a loss that adds nothing to them.
                done = job.precision.backward_step(
                    self._no_loss(), self.optimizer, clip=s.clip or None
                )
                share_buffers(self.nets)
            else:
                done = job.precision.backward_step(
                    loss * share, self.optimizer, clip=s.clip or None, update=last
                )
            norm = done.grad_norm
            loss_sum += float(loss.detach()) * len(batch.labels)
            right += int((logits.detach().argmax(dim=1) == batch.labels).sum())
        if self.ema is not None and done.stepped:
            self.ema.update(job.net)
        return {"loss": loss_sum, "right": right, "seen": total, "grad_norm": norm or 0.0}

    def _no_loss(self) -> Tensor:
        first = next(p for net in self.nets for p in net.parameters() if p.requires_grad)
        return (first * 0).sum()

    def _train_mode(self) -> None:
        for net in self.nets:
            net.train()
            if self.job.frozen_norms:
                freeze_norm_statistics(net)

    # -- the whole --------------------------------------------------------------------------------

    def run(self) -> Best:
        """Train to the end. Returns the weights of the best epoch."""
        job, s = self.job, self.job.settings
        batches = len(job.loader)
        per_epoch = -(-batches // s.accumulation)
        total = s.total_steps(batches)
        step, epoch = 0, 0
        sums = {"loss": 0.0, "right": 0, "seen": 0, "grad_norm": 0.0, "steps": 0}
        if self.state.restore():
            step, epoch = self.state.counters["step"], self.state.counters["epoch"]
            sums = self.state.counters["sums"]
            job.log.say(f"{job.stage}: resumed at epoch {epoch + 1}, step {step}")
        else:  # lines that a killed try of this stage wrote are dropped
            job.log.begin()
            before = (int(done.get("csv_position", 0)) for done in job.log.stages.values())
            job.csv.cut(max(before, default=0))
        if s.compile:
            example = torch.zeros(
                2, 3, *job.loader.loader.view.size, device=job.loader.normalizer.device
            )
            self.forward = compiled(job.net, wanted=True, example=example)
        saved = time.monotonic()
        while epoch < s.epochs and step < total:
            self._train_mode()
            done = job.loader.loader.order.position // s.batch_size // s.accumulation
            label = f"{job.stage} epoch {epoch + 1}/{s.epochs}"
            groups = groups_of(iter(job.loader), s.accumulation)
            for group in progress(groups, total=per_epoch, label=label, done=done):
                rate = s.rate(step, total=total, steps_per_epoch=per_epoch)
                for name, value in self.step(group, rate).items():
                    sums[name] += value
                sums["steps"] += 1
                step += 1
                if step >= total:
                    break
                due = s.log_interval and step % s.log_interval == 0
                if due and sums["steps"] < per_epoch:
                    self._line(step, rate, sums)
                    if self._agreed(time.monotonic() - saved >= s.save_seconds):
                        self.state.save(step=step, epoch=epoch, sums=sums)
                        saved = time.monotonic()
            job.loader.loader.order.set_epoch(epoch + 1)  # also when the last step came early
            self._end_epoch(epoch, step, rate, sums)
            epoch += 1
            sums = {"loss": 0.0, "right": 0, "seen": 0, "grad_norm": 0.0, "steps": 0}
            self.state.save(step=step, epoch=epoch, sums=sums)
            saved = time.monotonic()
        return self.best

    def _agreed(self, mine: bool) -> bool:
        """The main process' answer, in every process: all save, or none does."""
        return gather_objects(mine, self.job.world)[0]

    def _line(self, step: int, rate: float, sums: dict[str, Any]) -> None:
        values = {"loss": sums["loss"] / sums["seen"], "lr": rate}
        self.job.log.write(self.job.stage, "train", step, values)

    def _end_epoch(self, epoch: int, step: int, rate: float, sums: dict[str, Any]) -> None:
        job = self.job
        if self.ema is not None:
            with self.ema.applied(job.net):
                found = self._validate()
                self._offer(found, epoch)
        else:
            found = self._validate()
            self._offer(found, epoch)
        agreement = None if job.reference is None else found.agreement(job.reference)
        scale = job.precision.scaler.get_scale() if job.precision.dtype == "fp16" else None
        seen = max(1, sums["seen"])
        values = {
            "train_loss": sums["loss"] / seen, "lr": rate,
            "train_acc": sums["right"] / seen if job.labelled else None,
            "val_loss": found.loss, "val_acc": found.accuracy, "agreement": agreement,
            "grad_norm": sums["grad_norm"] / max(1, sums["steps"]) if job.settings.clip else None,
            "loss_scale": scale, "skipped_steps": job.precision.skipped_steps,
        }  # fmt: skip
        job.log.write(job.stage, "val", epoch + 1, values)
        row = {"stage": job.stage, "epoch": epoch + 1, "step": step, **values}
        job.csv.write({**row, "seconds": round(self.state.seconds, 3)})
        same = "" if agreement is None else f", agreement {agreement:.4f}"
        job.log.say(
            f"{job.stage}: epoch {epoch + 1}/{job.settings.epochs}, "
            f"loss {values['train_loss']:.4f}, validation {found.accuracy:.4f}{same}"
        )

    def _validate(self) -> Evaluation:
        job = self.job
        return evaluate(
            job.net, job.validation, precision=job.precision, world=job.world,
            total=job.validation_size(),
        )  # fmt: skip

    def _offer(self, found: Evaluation, epoch: int) -> None:
        score = found.accuracy if self.job.score is None else self.job.score(found)
        self.best.offer(self.job.net, score, epoch + 1)
