"""The stages below the exits, backbone and student: each ends with a model file and numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.run import Run, pairs
from gfnet_dynn.scene_views import TurnedLoader
from gfnet_dynn.train.deep_supervision import DeepTask
from gfnet_dynn.train.distillation import (
    DistillationTask,
    class_centres,
    freeze_teacher,
    matched_blocks,
)
from gfnet_dynn.train.finetune import FineTune, PlainTask, Task
from gfnet_dynn.train.teacher import FRESH_RATE, HEAD_RATE, start_teacher, stored_answers
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.precision import Precision

FILES = {"backbone": "backbone", "distil": "student", "labels": "labels"}  # by stage
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

    With ``--teacher FILE`` it is that file and learns nothing; with the name of a network it is
    that one, fine-tuned from its trained weights.

    Returns:
        What the run's log keeps of the stage.
    """
    settings, names = run.settings, run.settings.networks
    if names.teacher_file is not None:
        return _take_teacher(run, names.teacher_file)
    run.seed("backbone")
    if names.teacher_network is not None:
        teacher = start_teacher(run)
        task = PlainTask(teacher, smoothing=settings.finetuning.smoothing)
        head = f"model.body.{teacher.head_name}"
        rates = {head: HEAD_RATE, f"inner.{head}": HEAD_RATE, "heads.": FRESH_RATE}
        return _fine_tune(run, "backbone", task, rates=rates)
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
    student, smoothing = _new_student(run), run.settings.finetuning.smoothing
    if run.settings.stored_answers:
        taught = run.settings.distillation.kd_weight
        answers = stored_answers(run) if taught else None
        task: Task = PlainTask(student, smoothing=smoothing)
        if taught:
            weights = run.settings.distillation
            task = DistillationTask(student, None, weights, smoothing=smoothing)
        return _fine_tune(run, "distil", task, answers=answers)
    return _fine_tune(run, "distil", _live_task(run, student).to(run.device))


def train_on_labels(run: Run) -> dict[str, Any]:
    """The student of stage 2 once more, same start, views and steps, from the labels alone.

    Returns:
        What the run's log keeps of the stage.
    """
    task = PlainTask(_new_student(run), smoothing=run.settings.finetuning.smoothing)
    return _fine_tune(run, "labels", task)


def _new_student(run: Run) -> nn.Module:
    """The student before it learns; equal weights at every call."""
    run.seed("distil")
    names = run.settings.networks
    student = new_network(run, arch=names.student_arch, dim=names.student_dim)
    if names.student_init is not None:
        load_pretrained(names.student_init, student, transfer=names.resolution_transfer)
        run.log.say(f"student: starts from {names.student_init}")
    return student


def _live_task(run: Run, student: nn.Module) -> DistillationTask:
    """A teacher that is asked every view as it is shown."""
    weights = run.settings.distillation
    teacher = freeze_teacher(load_model(run.file("backbone"))[0]).to(run.device)
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
    return DistillationTask(
        student,
        teacher,
        weights,
        centres=centres,
        pairs=blocks,
        smoothing=run.settings.finetuning.smoothing,
    )


def _batches(run: Run, stage: str, answers: np.ndarray | None) -> TorchLoader | TurnedLoader:
    """What a stage learns from; a student and its twin from labels see the same views."""
    size = run.settings.finetuning.finetune_batch
    if stage != "backbone":
        return run.student_batches("distil", batch_size=size, answers=answers)
    loaders = run.loaders(shared=True)
    trained = run.settings.networks.teacher_network is not None
    return (loaders.shifted if trained else loaders.train)(stage, batch_size=size)


def usual_epochs(images: int, *, started: bool) -> int:
    """Epochs for so many training images where none are asked for: about as many steps for all.

    Args:
        started: from trained weights, which a few passes are enough for.
    """
    shown, least, most = (32_000, 3, 20) if started else (230_000, 12, 120)
    return min(most, max(least, round(shown / images)))


def _fine_tune(
    run: Run,
    stage: str,
    task: Task,
    *,
    answers: np.ndarray | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Train, save the best epoch's weights, and say how good they are."""
    settings, data, learn = run.settings, run.data, run.settings.finetuning
    name = FILES[stage]
    asked = learn.backbone_epochs if name == "backbone" else learn.student_epochs
    carries_exits = name != "backbone" or settings.networks.no_distil
    if carries_exits and settings.deep.deep_supervision:
        exits = settings.exits.blocks(task.model.depth)
        task = DeepTask(task, exits, settings.deep, smoothing=learn.smoothing).to(run.device)
    loaders = run.loaders(shared=True)
    training = FineTune(
        stage,
        task,
        loader=_batches(run, stage, answers),
        validation=loaders.held("calibration"),
        num_classes=len(data.classes),
        image_size=data.input_size,
        epochs=asked or usual_epochs(len(data.image_set("train")), started=rates is not None),
        base_lr=learn.backbone_lr if name == "backbone" else learn.student_lr,
        precision=Precision(run.device, run.precision),
        settings=learn,
        log=run.log,
        world=run.world,
        rates=rates,
        started=rates is not None,
    )
    best = training.run()
    start = {"start": task.model.start} if isinstance(task.model, NamedNetwork) else {}
    if run.world.is_main:
        save_model(
            run.file(name),
            task.model,
            best.weights,
            data=data,
            epoch=best.epoch,
            metrics={"calibration_accuracy": best.accuracy},
            config=run.config,
            **start,
        )
    return {
        **start,
        "calibration_accuracy": best.accuracy,
        "epoch": best.epoch,
        "file": run.file(name).name,
        "seconds": training.state.seconds,
    }
