"""What every stage of a run needs: its options, data, log, files; and how a network is judged."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from shared_core.datasets import ImageSet
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.distributed import World
from shared_core.runs import StageLog
from visiondistill_gc.utils.data_utils import GarbageData, eval_loader
from visiondistill_gc.utils.precision import LeveledPrecision
from visiondistill_gc.utils.prediction import Outputs, predict_logits, softmax
from visiondistill_gc.utils.transforms import MEAN, STD
from visiondistill_gc.utils.visual_log import VisualLog


@dataclass
class Run:
    """What every stage needs."""

    args: argparse.Namespace
    config: dict[str, Any]
    data: GarbageData
    log: StageLog
    world: World

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.log.folder

    @property
    def models(self) -> Path:
        """The folder of finished models."""
        return Path(self.args.save_dir or self.folder / "models_saved")

    @property
    def logs(self) -> Path:
        """VisualDL's folder; each training has one below it."""
        return Path(self.args.log_dir or self.folder / "logs")

    def student_file(self, fold: int) -> Path:
        """As the README names it."""
        return self.models / f"best_model_fold{fold}.pdparams"

    def teacher_file(self, fold: int) -> Path:
        """The teacher that this fold's training part made, or the one that was given."""
        return self.args.teacher_weights or self.models / f"teacher_fold{fold}.pdparams"

    def visual(self, name: str) -> VisualLog:
        """The log of one training, in the main process only."""
        return VisualLog(self.logs / name if self.args.visualdl and self.world.is_main else None)

    def precision(self) -> LeveledPrecision:
        """As ``--amp`` says."""
        return LeveledPrecision(self.world.device, level=self.args.amp, dtype=self.args.amp_dtype)


def normalizer() -> Normalizer:
    """ImageNet mean and deviation, as the original's transforms."""
    return Normalizer(MEAN, STD)


def predict(run: Run, net: nn.Layer, images: ImageSet) -> Outputs:
    """Logits of every image, in order; the network is in eval mode."""
    batches = eval_loader(images, run.args.input_size, workers=run.args.num_workers)
    return predict_logits(net, batches, normalizer=normalizer())


def accuracy(outputs: Outputs) -> float:
    """Fraction of right answers."""
    return float((outputs.logits.argmax(axis=1) == outputs.labels).mean())


def cross_entropy(outputs: Outputs) -> float:
    """Mean negative log probability of the label, nats."""
    rows = np.arange(len(outputs.labels))
    probs = softmax(outputs.logits)[rows, outputs.labels]
    return float(-np.log(np.maximum(probs, 1e-300)).mean())
