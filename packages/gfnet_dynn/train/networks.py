"""The stages below the exits, backbone and student: each ends with a model file and numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from gfnet_dynn.choices import PYRAMID_ARCHS
from gfnet_dynn.model_files import (
    EXITS,
    check_fits,
    load_model,
    load_pretrained,
    save_model,
)
from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.run import Run, pairs
from gfnet_dynn.train.deep_supervision import DeepTask
from gfnet_dynn.train.distillation import (
    DistillationTask,
    class_centres,
    freeze_teacher,
    matched_blocks,
)
from gfnet_dynn.train.finetune import FineTune, PlainTask, Task
from shared_core.for_torch.precision import Precision

SPECTRUM_BLOCKS = 4  # pairs of blocks that the spectrum term compares


def new_network(run: Run, *, arch: str, dim: int | None) -> nn.Module:
    """An untrained network of the run's sizes, on its device."""
    sizes = run.settings.networks
    pyramid = arch in PYRAMID_ARCHS
    model = build_gfnet(
        arch,
        img_size=run.data.input_size,
        num_classes=len(run.data.classes),
        patch_size=None if pyramid else sizes.patch_size,
        embed_dim=None if pyramid else dim,
        depth=None if pyramid else sizes.depth,
        drop_path_rate=sizes.drop_path,
        filter=sizes.filter,
    )
    return model.to(run.device)


def train_backbone(run: Run) -> dict[str, Any]:
    """Stage 1: the backbone learns the classes, from ``--init`` weights if there are any.

    With ``--teacher`` it is that file and learns nothing.

    Returns:
        What the run's log keeps of the stage.
    """
    settings = run.settings
    if settings.networks.teacher is not None:
        return _take_teacher(run, settings.networks.teacher)
    run.seed("backbone")
    names = settings.networks
    model = new_network(run, arch=names.backbone_arch, dim=names.backbone_dim)
    if names.pretrained is not None:
        replaced = load_pretrained(names.pretrained, model, transfer=names.resolution_transfer)
        head = "a new head" if replaced else "its own head"
        run.log.say(f"backbone: starts from {names.pretrained} with {head}")
    task = PlainTask(model, smoothing=settings.finetuning.smoothing)
    return _fine_tune(run, "backbone", task)


def _take_teacher(run: Run, path: Path) -> dict[str, Any]:
    """A trained model in the backbone's place: its file is copied into the run.

    Raises:
        ValueError: a model of other classes or another size, or one with exits.
    """
    model, facts = load_model(path)
    if facts["architecture"] == EXITS:
        raise ValueError(f"--teacher {path} is a model with exits: expected a plain network")
    check_fits(path, model, facts, run.data)
    target = run.file("backbone")
    if run.world.is_main:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    run.log.say(f"backbone: {path} takes its place")
    return {"file": target.name, "teacher": str(path), "sha256": facts["sha256"], "seconds": 0.0}


def distil_student(run: Run) -> dict[str, Any]:
    """Stage 2: a narrower GFNet learns from the labels and from the frozen backbone.

    Returns:
        What the run's log keeps of the stage.
    """
    settings, weights = run.settings, run.settings.distillation
    run.seed("distil")
    teacher = freeze_teacher(load_model(run.file("backbone"))[0]).to(run.device)
    names = settings.networks
    student = new_network(run, arch=names.student_arch, dim=names.student_dim)
    centres = None
    if weights.nd_weight:
        batches = pairs(run.loaders().held("train"), "class centres")
        centres = class_centres(teacher, batches, num_classes=len(run.data.classes))
    blocks: list[tuple[int, int]] = []
    if weights.spectrum_weight:
        if not isinstance(teacher, GFNet) or teacher.grid != student.grid:
            raise ValueError(
                "--spectrum-weight compares tokens of one grid, the teacher has another: expected "
                "a teacher with the student's patches, or 0"
            )
        depths = student.depth, teacher.depth
        blocks = matched_blocks(*depths, min(SPECTRUM_BLOCKS, *depths))
    task = DistillationTask(
        student,
        teacher,
        weights,
        centres=centres,
        pairs=blocks,
        smoothing=settings.finetuning.smoothing,
    )
    return _fine_tune(run, "distil", task.to(run.device))


def _fine_tune(run: Run, stage: str, task: Task) -> dict[str, Any]:
    """Train, save the best epoch's weights, and say how good they are."""
    settings, data = run.settings, run.data
    learn, name = settings.finetuning, "backbone" if stage == "backbone" else "student"
    carries_exits = name == "student" or settings.networks.no_distil
    if carries_exits and settings.deep.deep_supervision:
        exits = settings.exits.blocks(task.model.depth)
        task = DeepTask(task, exits, settings.deep, smoothing=learn.smoothing).to(run.device)
    loaders = run.loaders(shared=True)
    training = FineTune(
        stage,
        task,
        loader=loaders.train(stage, batch_size=learn.finetune_batch),
        validation=loaders.held("calibration"),
        num_classes=len(data.classes),
        image_size=data.input_size,
        epochs=learn.backbone_epochs if name == "backbone" else learn.student_epochs,
        base_lr=learn.backbone_lr if name == "backbone" else learn.student_lr,
        precision=Precision(run.device, run.precision),
        settings=learn,
        log=run.log,
        world=run.world,
    )
    best = training.run()
    if run.world.is_main:
        save_model(
            run.file(name),
            task.model,
            best.weights,
            data=data,
            epoch=best.epoch,
            metrics={"calibration_accuracy": best.accuracy},
            config=run.config,
        )
    return {
        "calibration_accuracy": best.accuracy,
        "epoch": best.epoch,
        "file": run.file(name).name,
        "seconds": training.state.seconds,
    }
