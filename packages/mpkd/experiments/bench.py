"""One cell of a sweep: a student trained, trained with few bits, or quantized, and measured.

The teacher of a sweep is a cell of its own, which every other one reads: its weights, its answers
to the views that students see, its logits of the test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpkd import few_bits
from mpkd.dataset.data_utils import TEST, Data
from mpkd.model.networks import build_net
from mpkd.quant.shipped import shipped
from mpkd.run_context import PACKED_FILE, STUDENT_FILE, TEACHER_FILE, Run
from mpkd.stages import (
    distil_stage,
    load_teacher,
    start_student,
    teacher_stage,
    train_student,
)
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.utils.common import describe_net, load_net, save_packed
from mpkd.utils.config import NEEDS_TEACHER
from shared_core.for_torch.cost import count_params
from shared_core.runs import StageLog
from shared_core.trials import Cell, run_cell
from shared_core.trials.running import CELLS, WORK

TEACHER, LOGITS_FILE = "teacher", "test_logits.npy"
# What a cell's result does not depend on.
FREE = (
    "dataset.workers", "dataset.data_dir_cifar10", "dataset.data_dir_imagenet",
    "dataset.data_dir_folder", "dataset.cache.enabled", "dataset.cache.dir",
    "experiment.out_dir", "experiment.name", "experiment.device", "experiment.threads",
    "experiment.seed", "logging.log_interval",
)  # fmt: skip


class CellLog(StageLog):
    """One cell's numbers and training state in a folder of their own; the sweep's log speaks."""

    def __init__(self, folder: Path, log: StageLog) -> None:
        super().__init__(folder)
        self._log = log

    def say(self, text: str) -> None:
        """One line for the user."""
        self._log.say(text)


@dataclass(frozen=True)
class Bench:
    """What all cells of a sweep have in common.

    Attributes:
        config: values by dotted key, which cells differ from.
        data: the images.
        folder: of the sweep.
        log: says a line.
        device: where it is computed.
        scale, command: for what is written down.
    """

    config: dict[str, Any]
    data: Data
    folder: Path
    log: StageLog
    device: torch.device
    scale: str
    command: str

    # -- cells ------------------------------------------------------------------------------------

    def cell(
        self, name: str, kind: str, changes: Mapping[str, Any], *, seed: int, needs: str = ""
    ) -> Cell:
        """A cell; its settings are everything that its result depends on.

        Args:
            kind: ``train`` (from nothing), ``scratch`` (from nothing, with few bits), ``quantize``
                (the student of the cell ``needs`` gets few bits).
            changes: keys of the configuration.
        """
        config = {**self.config, **changes}
        settings = {key: value for key, value in config.items() if key not in FREE}
        settings |= {"kind": kind, "split_hash": self.data.split_hash}
        return Cell(name, settings, seed, needs=(needs,) if needs else ())

    def teacher_cell(self) -> Cell:
        """The one teacher of all cells."""
        return self.cell(TEACHER, TEACHER, {}, seed=self.config["experiment.seed"])

    def make_teacher(self) -> dict[str, Any]:
        """What is known of the teacher, made where it is not there yet."""
        return run_cell(self.teacher_cell(), self.measure, folder=self.folder)["result"]

    def work_of(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.folder / CELLS / cell.folder_name / WORK

    # -- measuring --------------------------------------------------------------------------------

    def run_of(self, cell: Cell, work: Path) -> Run:
        """A run of the pipeline in the cell's folder."""
        known = {k: v for k, v in cell.settings.items() if k in self.config}
        config = {**self.config, **known, "experiment.seed": cell.seed}
        log = CellLog(work, self.log)
        return Run(
            config=config, data=self.data, folder=work, log=log,
            csv=MetricsLogger(work / "epochs.csv", run_id=work.parent.name), device=self.device,
            scale=self.scale, command=self.command,
            knowledge=self.work_of(self.teacher_cell()) / "knowledge",
        )  # fmt: skip

    def measure(self, cell: Cell, work: Path) -> dict[str, Any]:
        """Make the network of a cell and measure it on the test images."""
        run = self.run_of(cell, work)
        ways = {
            TEACHER: self._teacher, "train": self._trained, "scratch": self._from_scratch,
            "quantize": self._quantized,
        }  # fmt: skip
        return ways[cell.settings["kind"]](run, cell)

    def _teacher(self, run: Run, cell: Cell) -> dict[str, Any]:
        found = teacher_stage(run)
        teacher, digest = load_teacher(run)
        if run.config["distillation.cache_teacher_logits"]:
            images = run.data.learning_set(unlabelled=True)
            run.fill_knowledge(run.teacher_engine(teacher), digest, images)
        logits = run.evaluate(teacher, TEST).logits
        np.save(run.folder / LOGITS_FILE, logits)
        return found

    def _guide(self, run: Run) -> tuple[nn.Module | None, str]:
        """The sweep's teacher, where the cell's objective has one."""
        if run.config["distillation.mode"] not in NEEDS_TEACHER:
            return None, ""
        net, facts = load_net(self.work_of(self.teacher_cell()) / "checkpoints" / TEACHER_FILE)
        return net.to(run.device), facts["sha256"]

    def _trained(self, run: Run, cell: Cell) -> dict[str, Any]:
        teacher, digest = self._guide(run)
        run.begin("student")  # the same start for every precision and objective
        started, _ = start_student(run, teacher, digest)
        student, about = started.net, started.about
        epoch, seconds = train_student(run, "student", student, teacher, digest)
        found = self._judged(run, student)
        run.save(STUDENT_FILE, student, about, epoch=epoch, metrics=found)
        size = self._packed(run, student)
        return {**found, "epoch": epoch, "training_seconds": seconds, "mean_bits": 32.0,
                "bytes": size, "parameters": count_params(student)}  # fmt: skip

    def _from_scratch(self, run: Run, cell: Cell) -> dict[str, Any]:
        """A student that has few bits from its first step on; one teacher may learn with it."""
        if run.config["distillation.mode"] == "apprentice_a":
            distil_stage(run)
            student, _ = load_net(run.checkpoint(STUDENT_FILE))
        else:
            teacher, digest = self._guide(run)
            run.begin("distil")
            started, _ = start_student(run, teacher, digest)
            student, about = started.net, started.about
            bits = few_bits.lower(run, student)
            epoch, _ = train_student(run, "distil", student, teacher, digest)
            run.save(STUDENT_FILE, student, about, epoch=epoch, metrics={}, quantization=bits)
        made = shipped(student.to(run.device))
        return {**self._judged(run, made), "bytes": self._packed(run, made)}

    def _quantized(self, run: Run, cell: Cell) -> dict[str, Any]:
        before = Cell(cell.needs[0], {}, cell.seed)
        student, _ = load_net(self.work_of(before) / "checkpoints" / STUDENT_FILE)
        teacher, digest = self._guide(run)
        made, written = few_bits.quantize(run, student.to(run.device), teacher, digest)
        record = made.record()
        names = ("mean_bits", "w_bits", "w_levels", "notes", "baselines", "bops", "finish")
        found = {**self._judged(run, made.net), **{name: record[name] for name in names}}
        found["bytes"] = self._packed(run, made.net)
        written()
        return found

    def _judged(self, run: Run, net: nn.Module) -> dict[str, Any]:
        test = run.evaluate(net, TEST)
        logits = np.load(self.work_of(self.teacher_cell()) / LOGITS_FILE)
        return {
            "test_accuracy": test.accuracy, "test_loss": test.loss,
            "agreement": test.agreement(logits),
        }  # fmt: skip

    def _packed(self, run: Run, net: nn.Module) -> int:
        """Bytes on disk of the network, its weights at the bits that they have."""
        about = {
            "schema": "smallvision-checkpoint/1", "project": "mpkd", "architecture": "student",
            "framework": "numpy", "class_names": [],
        }  # fmt: skip
        return save_packed(run.checkpoint(PACKED_FILE), shipped(net), about)


def student_parameters(bench: Bench) -> int:
    """Parameters of the student of these settings."""
    run = bench.run_of(bench.teacher_cell(), bench.folder)
    about = describe_net("student", run.config, image_size=run.data.image_size)
    return count_params(build_net(about, num_classes=len(run.data.classes)))
