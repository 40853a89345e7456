"""The networks and trainings that the benchmark of mpkd times, made by mpkd's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.dataset import views
from mpkd.dataset.data_utils import TRAIN
from mpkd.dataset.sources import load_data
from mpkd.model.networks import PLAIN, build_net
from mpkd.run_context import Run
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import make_objective
from mpkd.trainer.settings import settings_from
from mpkd.trainer.trainer import Job, Trainer
from mpkd.utils.common import describe_net
from mpkd.utils.config import load_config
from shared_core.datasets import digits
from shared_core.deploy.facts import ModelFacts
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.data import Normalizer, TorchBatch
from shared_core.runs import StageLog

PIXELS, BATCH = 32, 64
# Small: Adam's first steps have the sign of each gradient, also of those that are only rounding.
RATE = 2e-5
SIDE, TILE = 224, 32
CPU = torch.device("cpu")

# -- the training step ----------------------------------------------------------------------------

WRITTEN = {"distillation.cache_teacher_logits": False}
STORED = {"training.channels_last": True}
LIVE = {
    "distillation.cache_teacher_logits": False, "distillation.teacher_engine": "openvino",
    "training.channels_last": True,
}  # fmt: skip
BF16 = {"mixed_precision.enabled": True, "mixed_precision.dtype": "bf16"}


def settled(net: nn.Module, images: Tensor) -> nn.Module:
    """``net`` in evaluation mode, its batch norms with the statistics of ``images``."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    net.train()
    with torch.no_grad():
        for part in images.split(32):
            net(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


@dataclass
class Training:
    """One way to distil: ``trainer.step`` on given batches."""

    trainer: Trainer
    batches: list[TorchBatch]
    turn: int = 0

    def step(self) -> float:
        """One step on the next batch; the mean loss of its images."""
        done = self.trainer.step([self.batches[self.turn % len(self.batches)]], RATE)
        self.turn += 1
        return done["loss"] / done["seen"]


def trainings(folder: Path, ways: dict[str, dict[str, Any]], *, count: int) -> dict[str, Training]:
    """ResNet-18 with the small stem into ``simple_cnn`` on ``count`` batches of digits, 32 pixels.

    Every way begins with the same random weights of both and sees the same images.
    """
    made: dict[str, Training] = {}
    shared: list[TorchBatch] = []
    for name, changes in ways.items():
        run = _run(folder / name, changes, count)
        images = run.data.sets[TRAIN]
        torch.manual_seed(0)
        teacher, student = (
            build_net(describe_net(role, run.config, image_size=PIXELS), num_classes=10)
            for role in ("teacher", "student")
        )
        if not shared:
            loader = run.training_loader("student", images, replayed=1)
            shared = [b._replace(images=b.images.clone()) for b in loader][:count]
        settled(teacher, shared[0].images[:32])
        source, replayed = run.teacher_source(teacher, weights_sha256(teacher.state_dict()), images)
        job = Job(
            "distil", student.train(), make_objective(run.config, source),
            run.training_loader("student", images, replayed=replayed), run.evaluation_loader(),
            settings_from(run.config), run.precision(student), run.log, run.csv,
        )  # fmt: skip
        made[name] = Training(Trainer(job), shared)
    return made


def _run(folder: Path, changes: dict[str, Any], count: int) -> Run:
    """A run of mpkd on digits that has only begun."""
    keys = {
        "dataset.name": "digits", "dataset.image_size": PIXELS, "dataset.workers": 0,
        "dataset.max_images": BATCH * (count + 1), "experiment.batch_size": BATCH,
        "distillation.views": 1, "model.teacher_model": "resnet18", "model.teacher_ckpt": "none",
        "training.channels_last": False, "mixed_precision.enabled": False,
    } | changes  # fmt: skip
    folder.mkdir(parents=True)
    config = load_config(None, (), overrides=keys)
    data = load_data(config, folder, data_root=None)
    csv = MetricsLogger(folder / "steps.csv", run_id="bench")
    return Run(config, data, folder, StageLog(folder), csv, CPU)


# -- the network to deploy ------------------------------------------------------------------------


@dataclass
class Deployed:
    """A MobileNetV2 that knows digits.

    Attributes:
        net: in evaluation mode.
        facts: what a predictor knows of it.
        calibration: training images, uint8 ``(N, 224, 224, 3)``.
        images: those that it was not trained on.
        labels: int64, of ``images``.
    """

    net: nn.Module
    facts: ModelFacts
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray


def tiled(images: np.ndarray, times: int) -> np.ndarray:
    """Digits of 32 pixels as a pattern of ``times`` x ``times``, uint8 ``(N, S, S, 3)``."""
    return np.ascontiguousarray(np.tile(images, (1, times, times, 1)))


def normal(images: np.ndarray) -> Tensor:
    """Normalised ``(N, 3, S, S)``."""
    return Normalizer()(images).contiguous()


def mobilenet(
    *, epochs: int, held_out: int, calibration: int, say: Callable[[str], None]
) -> Deployed:
    """Train MobileNetV2 for a minute or two, so that int8 has answers to keep.

    It learns patterns of 2 x 2 digits, and answers to patterns of 7 x 7, at 224 pixels; its batch
    norms get their statistics there.
    """
    pixels, labels = digits(size=TILE)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, labels = pixels[order], labels[order]
    test = len(pixels) - held_out
    images = normal(tiled(pixels[:test], 2)).to(memory_format=torch.channels_last)
    truth = torch.from_numpy(labels[:test])
    torch.manual_seed(0)
    about = {"name": "mobilenet_v2", "image_size": SIDE, "stem": "auto"}
    net = build_net(about, num_classes=10)
    net.classifier[0].p = 0.0  # no dropout
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    steps = epochs * (test // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(test)[: test // 32 * 32].split(32):
            F.cross_entropy(net(images[rows]), truth[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.to(memory_format=torch.contiguous_format)
    large = tiled(pixels[:96], SIDE // TILE)
    settled(net, normal(large))
    names = tuple(str(n) for n in range(10))
    facts = ModelFacts(
        "mpkd", "mobilenet_v2", names, (SIDE, SIDE), views.eval_view(SIDE).settings(), PLAIN.mean,
        PLAIN.std,
    )  # fmt: skip
    made = Deployed(
        net, facts, large[:calibration], tiled(pixels[test:], SIDE // TILE), labels[test:]
    )  # fmt: skip
    with torch.no_grad():
        parts = normal(made.images).split(16)
        answers = torch.cat([net(part) for part in parts]).argmax(1).numpy()
    say(f"MobileNetV2: {(answers == made.labels).mean():.3f} of {held_out} held-out images right")
    return made
