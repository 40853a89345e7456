"""The training stages: backbone, distil, exits. Each ends with a model file and a few numbers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfnet_dynn.data_loader_helper import Data, eval_loader, train_loader
from gfnet_dynn.deep_supervision import DeepSupervision
from gfnet_dynn.distillation import (
    DistillationLoss,
    class_centres,
    distillation_losses,
    freeze_teacher,
    matched_blocks,
)
from gfnet_dynn.finetune import Losses, cross_entropy_losses, fine_tune
from gfnet_dynn.model_files import PLAIN, load_model, load_pretrained, save_model
from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.parallel import ALONE
from gfnet_dynn.run_log import RunLog
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import World
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import derive_seed, progress

SPECTRUM_BLOCKS = 4  # pairs of blocks that the spectrum term compares


@dataclass
class Run:
    """What every stage needs."""

    args: argparse.Namespace
    config: dict[str, Any]
    data: Data
    log: RunLog
    device: torch.device
    precision: str
    world: World = ALONE

    @property
    def share(self) -> dict[str, int]:
        """Which part of the images this process gets, for the loaders."""
        return {"rank": self.world.rank, "world_size": self.world.world_size}

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.log.folder

    def file(self, stage: str) -> Path:
        """The model file of ``backbone`` or ``student``."""
        return self.folder / "checkpoint" / f"{stage}_{self.data.name.replace(' ', '-')}.pth"

    def seed(self, stage: str) -> None:
        """Every stage draws from a stream of its own."""
        seed_all(derive_seed(self.args.seed, stage) % 2**32)


def pairs(loader: TorchLoader, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """``(images, labels)`` of each batch, with progress."""
    for batch in progress(loader, total=len(loader), label=label):
        yield batch.images, batch.labels


def new_gfnet(run: Run, *, arch: str, dim: int | None) -> GFNet:
    """An untrained isotropic GFNet of the run's sizes, on its device."""
    args = run.args
    model = build_gfnet(
        arch,
        img_size=run.data.input_size,
        num_classes=len(run.data.classes),
        patch_size=args.patch_size,
        embed_dim=dim,
        depth=args.depth,
        drop_path_rate=args.drop_path,
        filter=args.filter,
    )
    return model.to(run.device)


def train_backbone(run: Run) -> dict[str, Any]:
    """Stage 1: the backbone learns the classes; from ``--pretrained`` weights if there are any."""
    args = run.args
    run.seed("backbone")
    model = new_gfnet(run, arch=args.backbone_arch, dim=args.backbone_dim)
    if args.pretrained is not None:
        replaced = load_pretrained(args.pretrained, model, transfer=args.resolution_transfer)
        head = "a new head" if replaced else "its own head"
        run.log.say(f"backbone: starts from {args.pretrained} with {head}")
    return _fine_tune_and_save(
        run, "backbone", model, cross_entropy_losses(model, smoothing=args.smoothing), None
    )


def distil_student(run: Run) -> dict[str, Any]:
    """Stage 2: a narrower GFNet learns from the labels and from the frozen backbone."""
    args, data = run.args, run.data
    run.seed("distil")
    teacher, _ = load_model(run.file("backbone"), architecture=PLAIN)
    teacher = freeze_teacher(teacher).to(run.device)
    student = new_gfnet(run, arch=args.student_arch, dim=args.student_dim)
    centres = None
    if args.nd_weight:
        batches = eval_loader(data, "train", args, device=run.device)
        centres = class_centres(
            teacher, pairs(batches, "class centres"), num_classes=len(data.classes)
        )
    blocks = []
    if args.spectrum_weight:
        depths = len(student.blocks), len(teacher.blocks)
        blocks = matched_blocks(*depths, min(SPECTRUM_BLOCKS, *depths))
    criterion = DistillationLoss(
        student_dim=student.embed_dim,
        teacher_dim=teacher.embed_dim,
        centres=centres,
        kd=args.kd_weight,
        nd=args.nd_weight,
        spectrum=args.spectrum_weight,
        temperature=args.kd_temperature,
        warm_up=args.kd_warmup,
        pairs=blocks,
        label_smoothing=args.smoothing,
    ).to(run.device)
    grid = student.grid if blocks else None

    def losses(images: Tensor, targets: Tensor, epoch: float) -> dict[str, Tensor]:
        return distillation_losses(
            criterion, student, teacher, images, targets, epoch=epoch, grid=grid
        )

    return _fine_tune_and_save(run, "distil", student, losses, criterion)


def _with_deep_supervision(
    run: Run, model: GFNet, losses: Losses, helper: nn.Module | None
) -> tuple[Losses, nn.Module | None]:
    """Losses at the exits as well, when ``--deep-supervision`` asks for them; their heads learn."""
    args = run.args
    if not args.deep_supervision:
        return losses, helper
    deep = DeepSupervision(
        model.embed_dim,
        len(run.data.classes),
        args.exits or tuple(range(model.depth - 1)),
        weight=args.deep_supervision,
        kd=args.deep_kd,
        temperature=args.deep_temperature,
        smoothing=args.smoothing,
    ).to(run.device)
    helpers = nn.ModuleList([deep] if helper is None else [helper, deep])
    return deep.added_to(losses, model), helpers


def _fine_tune_and_save(
    run: Run, stage: str, model: GFNet, losses: Losses, helper: nn.Module | None
) -> dict[str, Any]:
    args, data = run.args, run.data
    name = "backbone" if stage == "backbone" else "student"
    if name == "student" or args.no_distil:  # what the exits will stand on
        losses, helper = _with_deep_supervision(run, model, losses, helper)
    loader = train_loader(
        data, args, stage=stage, batch_size=args.finetune_batch, device=run.device, **run.share
    )
    best, state = fine_tune(
        stage,
        model,
        losses,
        loader=loader,
        validation=eval_loader(data, "calibration", args, device=run.device, **run.share),
        num_classes=len(data.classes),
        image_size=data.input_size,
        epochs=getattr(args, f"{name}_epochs"),
        base_lr=getattr(args, f"{name}_lr"),
        precision=Precision(run.device, run.precision),
        args=args,
        log=run.log,
        helper=helper,
        world=run.world,
    )
    if run.world.is_main:
        save_model(
            run.file(name),
            model,
            best.weights,
            data=data,
            epoch=best.epoch,
            metrics={"calibration_accuracy": best.accuracy},
            config=run.config,
        )
    result = {
        "calibration_accuracy": best.accuracy,
        "epoch": best.epoch,
        "file": run.file(name).name,
        "seconds": state.seconds,
    }
    run.log.finish(stage, result)
    state.remove()
    return result
