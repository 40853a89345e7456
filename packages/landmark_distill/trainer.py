"""Training, validation and test: one step function, exact resume, the best and the last kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark_distill.config import AUTO, RunConfig
from landmark_distill.head.distillation import KDSettings
from landmark_distill.head.streamed_loss import label_rows
from landmark_distill.helpers import (
    make_eval_loader,
    make_source,
    make_train_loader,
    precision_of,
    prepare_optimizer,
    prepare_student,
    prepare_teacher,
    unseen_loader,
)
from landmark_distill.images.landmark_data import LandmarkData
from landmark_distill.images.views import ViewLoader
from landmark_distill.judging.judge import openset_test
from landmark_distill.judging.trained_features import fine_numbers
from landmark_distill.model import EmbeddingModel, parameter_counts
from landmark_distill.model_files import TEACHER, save_model, student_weights
from landmark_distill.objective import Objective
from landmark_distill.optimizers import set_lr
from landmark_distill.starting import start_features
from landmark_distill.teacher import TeacherOutputs, in_the_teachers_rows
from landmark_distill.utils import BEST, STATE, Record, epoch_line, parameters_line
from shared_core.for_torch.checkpoints import load_run_state, save_run_state
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.distributed import (
    World,
    barrier,
    gather_objects,
    gather_samples,
    main_writes,
    share_buffers,
    wrap,
)
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.seeds import capture_rng, seed_all
from shared_core.runs import MetricLog, derive_seed, progress

LAST = "last.pth"


class StudentState:
    """The weights that a run's state holds: the student's own, never a shared head."""

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Encoder, and head when it is the student's own."""
        return student_weights(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put them back."""
        with torch.no_grad():
            own = student_weights(self.model)
            if own.keys() != state.keys():
                raise ValueError(f"{len(state)} weights, expected {len(own)}")
            for name, value in own.items():
                value.copy_(state[name])


class Trainer:
    """One run: makes everything it needs from its configuration, trains, says what came of it.

    Args:
        config: of the run.
        folder: the run's.
        data: of the run.
        world: this process among how many.

    Attributes:
        notes: what the record must say of the teacher.
    """

    def __init__(self, config: RunConfig, folder: Path, data: LandmarkData, world: World) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.train_config, self.rate = config.train, config.train.schedule
        self.record = Record(folder, quiet=not world.is_main)
        self.log = MetricLog(folder / "metrics.jsonl")
        if data.train is None or data.calibration is None:
            raise ValueError("no training images: expected a run that trains")
        asked = config.distill
        seed_all(derive_seed(config.train.seed, "student") % 2**32)
        self.teacher = prepare_teacher(config, world) if asked else None
        self.notes: dict[str, Any] = {}
        if self.teacher is not None and asked is not None:
            data, self.notes = in_the_teachers_rows(data, self.teacher, asked)
        self.data = data
        self.model, self.start = prepare_student(config, data, world, self.teacher)
        self.optimizer = prepare_optimizer(config.train, self.model, self.start)
        self.precision = Precision(world.device, precision_of(config, world.device))
        self.loader = make_train_loader(config, data.train, world)
        self.validation = make_eval_loader(config, data.calibration, world)
        self.unseen = unseen_loader(config, data, world)
        self.source = make_source(config, self.teacher, data, world)
        self.feature_start = self._start_features()
        objective = Objective(
            self.model,
            kd_loss=asked.loss if asked else None,
            teacher_head=self.teacher.head if self.teacher else None,
            kd_weight=asked.weight if asked else 0.0,
            ce_weight=config.train.ce_weight,
            kd=KDSettings(asked.variant, asked.temperature) if asked else None,
            processes=world.world_size,
        )
        self.objective = wrap(objective, world)
        self.epoch, self.max_acc, self.best_epoch, self.best = 0, -1.0, -1, -1.0
        self.lr = self.rate.lr
        self.sums = _zeros()
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the training, that of processes before a resume included."""
        return self._seconds + time.monotonic() - self._since

    def _start_features(self) -> str | None:
        """Start the new layer above a trained body, once; None where there is nothing to start."""
        asked, found = self.train_config, (self.folder / STATE).exists()
        trained = self.start.trained_body and hasattr(self.model.encoder, "project")
        if found or self.config.fill_knowledge or not trained or asked.feature_start != AUTO:
            return None

        def goals(batch: TorchBatch) -> Tensor:
            known = self.source.outputs(batch).features
            return self.teacher.features(batch.images) if known is None else known

        alone = replace(self.world, rank=0, world_size=1)  # each process looks at all images
        loader = make_train_loader(self.config, self.data.train, alone)
        batches = progress(loader, total=len(loader), label="starting the feature layer")
        return start_features(
            self.model,
            batches if self.world.is_main else loader,
            precision=self.precision,
            goals=goals if self.teacher is not None else None,
        )

    # -- one step ---------------------------------------------------------------------------------

    def train_step(self, batch: TorchBatch) -> dict[str, Tensor]:
        """One update of the student. Returns its losses."""
        images = batch.images
        if self.train_config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = self.source.outputs(batch) if self.source else TeacherOutputs()
        with self.precision.autocast():
            losses = self.objective(images, batch.labels, outputs)
        self.precision.backward_step(
            losses["loss"], self.optimizer, clip=self.train_config.clip or None
        )
        return {name: value.detach() for name, value in losses.items()}

    # -- the loop ---------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """From the saved state, or from the start, to the last epoch.

        Returns:
            ``max_acc`` (fraction), ``best_epoch`` (from 1; 0: as it started), ``seconds``.
        """
        try:
            self._run_epochs()
        finally:
            if self.source is not None:
                self.source.close()
        self._write_model(self.folder / LAST)
        barrier(self.world)
        return {
            "max_acc": self.max_acc,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
        }

    def _run_epochs(self) -> None:
        if not self._start() and self.feature_start is not None:
            self._judge_epoch({})  # what a trained body gives as it is must be beaten
        while self.epoch < self.rate.max_epoch:
            self._train_epoch()
            means = self._close_epoch()
            last = self.epoch == self.rate.max_epoch
            if last or self.epoch % self.train_config.eval_interval == 0:
                self._judge_epoch(means)
            self.save()

    def _train_epoch(self) -> None:
        steps = len(self.loader)
        order = self.loader.loader.order
        step = -(-order.position // self.loader.loader.batch_size)
        self.objective.train()
        label = f"epoch {self.epoch + 1}/{self.rate.max_epoch}"
        batches = progress(self.loader, total=steps, label=label, done=step)
        save_every = self.train_config.save_every
        for batch in batches if self.world.is_main else self.loader:
            self.lr = self.rate.at(self.epoch, step, steps)
            set_lr(self.optimizer, self.lr)
            losses = self.train_step(batch)
            step += 1
            self._count(losses, len(batch.labels), step, steps)
            if save_every and step < steps and step % save_every == 0:
                self.save()
        self.epoch += 1

    def _count(self, losses: dict[str, Tensor], count: int, step: int, steps: int) -> None:
        """Add a step to the sums of the epoch, and log it now and then.

        Raises:
            ValueError: a loss that is not a number.
        """
        self.sums["seen"] += count
        self.sums["correct"] += int(losses["correct"])
        for name in ("ce", "kd", "loss"):
            value = float(losses[name])
            if value != value:
                raise ValueError(
                    f"the loss is not a number in epoch {self.epoch + 1}, step {step}: "
                    f"expected a smaller --lr than {self.rate.lr:g}, or another --amp"
                )
            self.sums[name] += value * count
        if step % self.train_config.log_interval == 0 and self.world.is_main:
            values = {name: float(losses[name]) for name in ("loss", "ce", "kd")}
            number = self.epoch * steps + step
            self.log.write({"split": "step", "step": number, "lr": self.lr, **values})

    def _close_epoch(self) -> dict[str, float]:
        """Log what the epoch brought on its training images; their mean losses and accuracy."""
        sums = gather_objects(self.sums, self.world)
        total = {name: sum(one[name] for one in sums) for name in self.sums}
        seen = max(total["seen"], 1)
        means = {name: total[name] / seen for name in ("loss", "ce", "kd")}
        means["acc"] = total["correct"] / seen
        self.sums = _zeros()
        if self.world.is_main:
            self.log.write({"split": "train", "step": self.epoch, "lr": self.lr, **means})
        return means

    def _judge_epoch(self, means: Mapping[str, float]) -> None:
        """Say and log what held-out images say, and keep the student if it is the best so far.

        Args:
            means: of the training images; empty before any training.
        """
        loss, acc = self.evaluate()
        unseen = self.judge_unseen()
        score = sum(unseen.values()) / len(unseen) if unseen else acc
        if self.world.is_main:
            self.log.write({"split": "val", "step": self.epoch, "loss": loss, "acc": acc, **unseen})
            line = epoch_line(
                self.epoch,
                self.lr,
                train_acc=means.get("acc", 0.0),
                eval_loss=loss,
                eval_acc=acc,
                eval_count=len(self.validation.loader.image_set),
                ce_loss=means.get("ce", 0.0),
                kd_loss=means.get("kd", 0.0),
            )
            said = (f", unseen {name}={value:.4f}" for name, value in unseen.items())
            self.record.write(line + "".join(said))
        if score > self.best:
            self.best, self.max_acc, self.best_epoch = score, acc, self.epoch
            self._write_model(self.folder / BEST)

    def judge_unseen(self) -> dict[str, float]:
        """recall@1 and VR at FAR 0.01 among the unseen classes that choose; empty: none do."""
        if self.unseen is None:
            return {}
        images = self.unseen.loader.image_set
        found = gather_samples(
            *embed_rows(self.model, self.unseen, self.precision), self.world, total=len(images)
        )
        rows = found.cpu().numpy()
        return fine_numbers(
            openset_test(rows, {"fine": images.labels}, far_targets=(0.01,), ks=(1,))
        )

    def evaluate(self) -> tuple[float, float]:
        """Mean loss (nats) and accuracy (fraction) on the calibration images, without margin."""
        total = len(self.validation.loader.image_set)
        share_buffers(self.model, self.world)
        rows = evaluate_rows(self.model, self.validation, self.precision)
        values = gather_samples(rows[0], rows[1], self.world, total=total).double()
        return float(values[:, 0].mean()), float(values[:, 1].mean())

    # -- files ------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        return {
            "student": StudentState(self.model),
            "optimizer": self.optimizer,
            "loader": self.loader,
            "precision": self.precision,
        }

    def save(self) -> None:
        """Write ``checkpoint.pth.tar``: everything that an exact continuation needs."""
        rng = gather_objects(capture_rng(), self.world)
        counters = {
            "epoch": self.epoch,
            "max_acc": self.max_acc,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "sums": gather_objects(self.sums, self.world),
            "seconds": self.seconds,
            "start": self.start.facts,
            "log_position": self.log.position(),
            "record_position": self.record.position(),
        }
        main_writes(
            lambda: save_run_state(self.folder / STATE, self._parts(), counters=counters, rng=rng),
            self.world,
        )

    def _start(self) -> bool:
        """Go on where the run's state stands (True), or begin; say what the run is made of."""
        path = self.folder / STATE
        found = path.exists()
        if found:
            counters = load_run_state(path, self._parts(), rank=self.world.rank)
            self.epoch, self.max_acc = counters["epoch"], counters["max_acc"]
            self.best_epoch, self.best = counters["best_epoch"], counters["best"]
            self.sums = counters["sums"][self.world.rank]
            self._seconds, self._since = counters["seconds"], time.monotonic()
            self.start = replace(self.start, facts=counters["start"])
        barrier(self.world)
        if not self.world.is_main:
            return found
        self.log.cut(counters["log_position"] if found else 0)
        self.record.cut(counters["record_position"] if found else 0)
        for line in self._opening(found):
            self.record.write(line)
        if found:
            self.record.write(
                f"--resume from epoch:{self.epoch} max_acc:{self.max_acc}, {path.name} fits"
            )
        return found

    def _opening(self, found: bool) -> list[str]:
        test = -(-len(self.data.test) // self.train_config.batch_size)
        student = parameter_counts(self.model)
        teacher = parameter_counts(self.teacher.model) if self.teacher else None
        return [
            "path exist!" if found else "path not exist!",
            f"num_device: {self.world.world_size}",
            f"num_workers: {self.config.data.threads}",
            f"len(train_loader): {len(self.loader)}",
            f"len(val_loader): {len(self.validation)}",
            f"len(test_loader): {test}",
            f"torch.cuda.is_available(): {torch.cuda.is_available()}",
            f"device: {self.world.device}",
            f"{self.config.network.name} {self.start.line}",
            *([self.feature_start] if self.feature_start else []),
            parameters_line(
                (student["trainable"], student["all"]),
                (teacher["trainable"], teacher["all"]) if teacher else None,
            ),
        ]

    def _write_model(self, path: Path) -> None:
        """The student alone; with ``--save_all`` its head and the teacher as well."""
        if not self.world.is_main:
            return
        weights = student_weights(self.model, whole=self.train_config.save_all)
        if self.train_config.save_all and self.teacher is not None:
            state = self.teacher.model.encoder.state_dict()
            weights |= {f"{TEACHER}encoder.{name}": value for name, value in state.items()}
        save_model(
            path,
            weights,
            network=self.config.network,
            class_names=list(self.data.class_names),
            epoch=self.epoch,
            metrics={"max_acc": self.max_acc},
            split_hash=self.data.split_hash,
            config=self.config.stored,
            views=self.config.views,
            start=self.start.facts,
        )


def _zeros() -> dict[str, float]:
    return {"seen": 0, "correct": 0, "ce": 0.0, "kd": 0.0, "loss": 0.0}


def evaluate_rows(
    model: EmbeddingModel, loader: ViewLoader, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Loss and whether the label was met, ``(n, 2)``, and the indices of this process' images.

    Through the head in pieces, however many classes it has, and in float32 at least, whatever
    precision the network or a kept head has: bfloat16 cannot rank a quarter million classes.
    """
    rows, indices = [], []
    if model.head is None:
        raise ValueError("the network has no head, expected one to evaluate")
    for features, batch in _embedded(model, loader, precision):
        losses, met = label_rows(features, model.head, batch.labels)
        rows.append(torch.stack([losses.float(), met.float()], dim=1))
        indices.append(batch.indices)
    return _gathered(rows, indices, loader, width=2)


def embed_rows(
    model: EmbeddingModel, loader: ViewLoader, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Features ``(n, D)`` float32 and the indices of this process' images."""
    rows, indices = [], []
    for features, batch in _embedded(model, loader, precision):
        rows.append(features)
        indices.append(batch.indices)
    return _gathered(rows, indices, loader, width=model.feature_dim)


def _embedded(
    model: EmbeddingModel, loader: ViewLoader, precision: Precision
) -> Iterator[tuple[Tensor, TorchBatch]]:
    model.eval()
    with torch.no_grad():
        for batch in loader:
            with precision.autocast():
                features = model.embed(batch.images)
            yield features.float(), batch
    loader.loader.order.set_epoch(0)


def _gathered(
    rows: list[Tensor], indices: list[Tensor], loader: ViewLoader, *, width: int
) -> tuple[Tensor, Tensor]:
    device = loader.normalizer.device
    if not rows:
        return torch.zeros(0, width, device=device), torch.zeros(
            0, dtype=torch.int64, device=device
        )
    return torch.cat(rows), torch.cat(indices).to(device)
