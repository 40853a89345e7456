"""The training stages: backbone, distil, exits. Each ends with a model file and a few numbers."""

from __future__ import annotations

import argparse
import shutil
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
from gfnet_dynn.finetune import BARELY_TRAIN, Losses, cross_entropy_losses, fine_tune
from gfnet_dynn.learning_helper import Alternation, optimizer_groups, phases_of
from gfnet_dynn.model_files import PLAIN, load_model, load_pretrained, save_model
from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.our_train_helper import (
    BARELY_EVALUATE,
    ExitTraining,
    evaluate,
    train_single_epoch,
    warm_up_epoch,
)
from gfnet_dynn.run_log import RunLog
from gfnet_dynn.warmup import WarmUp, warmup_folder
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best, StageState
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
        data, args, stage=stage, batch_size=args.finetune_batch, device=run.device
    )
    best, state = fine_tune(
        stage,
        model,
        losses,
        loader=loader,
        validation=eval_loader(data, "calibration", args, device=run.device),
        num_classes=len(data.classes),
        image_size=data.input_size,
        epochs=getattr(args, f"{name}_epochs"),
        base_lr=getattr(args, f"{name}_lr"),
        precision=Precision(run.device, run.precision),
        args=args,
        log=run.log,
        helper=helper,
    )
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


def confidence_folder(run: Run) -> Path:
    """The folder of exit checkpoints, named as the original names it."""
    args = run.args
    name = f"checkpoint_{run.data.name.replace(' ', '-')}_{args.ce_ic_tradeoff}_confEE"
    return run.folder / "checkpoint" / name


def train_exits(run: Run) -> dict[str, Any]:
    """Stage 3: heads warm up one by one, then gates and heads (or the backbone) take turns.

    The best model by gated accuracy on the calibration split, under the policy that will be
    deployed, goes to ``checkpoint/best/`` as well.
    """
    args, data = run.args, run.data
    run.seed("exits")
    source = args.checkpoint or run.file("backbone" if args.no_distil else "student")
    backbone, facts = load_model(source, architecture=PLAIN)
    _check_source(source, backbone, facts, data)
    exits = args.exits or tuple(range(backbone.depth - 1))
    model = GFNetDynn(backbone, exits, gate=args.gate).to(run.device)
    groups = optimizer_groups(model, lr=args.lr, gate_lr=args.gate_lr or args.lr)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.wd)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=args.num_epoch, eta_min=min(args.min_lr, args.lr)
    )
    training = ExitTraining(
        model,
        optimizer,
        tradeoff=args.ce_ic_tradeoff,
        objective=args.gate_objective,
        classifier_mode=args.classifier_loss,
        precision=Precision(run.device, run.precision),
    )
    warm_up = WarmUp(
        exits,
        patience=args.patience,
        max_epochs=args.max_warmup_epoch if args.early_exit_warmup else 0,
        folder=warmup_folder(
            run.folder / "checkpoint",
            data_set=data.name.replace(" ", "-"),
            image_size=data.input_size,
            tradeoff=args.ce_ic_tradeoff,
        ),
    )
    alternation = Alternation(args.bilevel_batch_count, phases=phases_of(args.phase2))
    loader = train_loader(data, args, stage="exits", batch_size=args.batch, device=run.device)
    best = Best()
    parts = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "training": training,
        "warm_up": warm_up,
        "alternation": alternation,
        "loader": loader,
        "best": best,
        "precision": training.precision,
    }
    state = StageState("exits", parts, run.log)
    first, best_name = 0, ""
    if state.restore():
        first, best_name = state.counters["epoch"], state.counters["best_name"]
        run.log.say(f"exits: resumed at epoch {first + 1}")
    else:
        state.save(epoch=0, best_name="")
    kind = args.policy  # patience has no score to choose epochs by
    if kind == "patience":
        kind = "gate" if args.gate == "unc" else "max_prob"
    policy = ExitPolicy(kind, 0.5)
    limits = (BARELY_TRAIN, BARELY_EVALUATE) if args.barely_train else (None, None)

    for epoch in range(first, args.num_epoch):
        calibration = eval_loader(data, "calibration", args, device=run.device)
        batches = pairs(loader, f"exits epoch {epoch + 1}/{args.num_epoch}")
        checked = pairs(calibration, "calibration split")
        in_warm_up = not warm_up.done
        if in_warm_up:
            trained, found = warm_up_epoch(
                training,
                warm_up,
                batches,
                checked,
                max_batches=limits[0],
                max_validation_batches=limits[1],
                split_hash=data.manifest.hash,
            )
        else:
            training.frozen_exits = () if args.phase2 == "exits" else tuple(range(len(exits)))
            turns = train_single_epoch(
                training, batches, alternation=alternation, max_batches=limits[0]
            )
            trained = {k: v for values in turns.values() for k, v in values.items()}
            found, outputs = evaluate(
                training,
                checked,
                policy=policy,
                split_hash=data.manifest.hash,
                max_batches=limits[1],
            )
            training.set_from_validation(outputs)
            scheduler.step()
            if best.offer(model, found["gated_acc"], epoch):
                best_name = (
                    f"ckpt_{data.name.replace(' ', '-')}_{epoch}__{args.ce_ic_tradeoff}"
                    f"__{round(100 * best.accuracy, 2)}.pth"
                )
                _save_exits(run, confidence_folder(run) / best_name, model, best, found)
        loader.loader.order.set_epoch(epoch + 1)  # also when --barely_train left batches out
        run.log.write("exits", "train", epoch, trained)
        run.log.write("exits", "val", epoch, found)
        run.log.say(
            f"exits: epoch {epoch + 1}/{args.num_epoch} "
            + (
                f"warm-up, {len(warm_up.frozen_exits)}/{len(exits)} exits settled, "
                if in_warm_up
                else f"{args.phase2}, gated accuracy {found['gated_acc']:.4f}, "
            )
            + "exits "
            + " ".join(f"{found[f'acc{e}']:.3f}" for e in exits)
            + f" final {found['acc_final']:.3f}"
        )
        state.save(epoch=epoch + 1, best_name=best_name)
    if not best_name:
        raise ValueError(
            f"all {args.num_epoch} epochs went to the warm-up: expected --num_epoch above "
            f"--max_warmup_epoch {args.max_warmup_epoch}"
        )
    chosen = confidence_folder(run) / best_name
    final = run.folder / "checkpoint" / "best" / best_name
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(chosen, final)
    result = {
        "calibration_gated_accuracy": best.accuracy,
        "epoch": best.epoch,
        "warm_up_epochs": warm_up.epoch,
        "file": best_name,
        "seconds": state.seconds,
    }
    run.log.finish("exits", result)
    state.remove()
    return result


def _check_source(path: Path, backbone: GFNet, facts: dict[str, Any], data: Data) -> None:
    """A backbone from elsewhere must know the data's classes and size."""
    if tuple(facts["class_names"]) != data.classes:
        raise ValueError(
            f"{path} knows {len(facts['class_names'])} classes "
            f"({', '.join(facts['class_names'][:3])}...), the data has {len(data.classes)} "
            f"({', '.join(data.classes[:3])}...)"
        )
    if backbone.img_size != (data.input_size, data.input_size):
        raise ValueError(
            f"{path} takes images of {backbone.img_size[0]} pixels, this run has "
            f"{data.input_size}: expected --input-size {backbone.img_size[0]}"
        )


def _save_exits(run: Run, path: Path, model: GFNetDynn, best: Best, found: dict) -> None:
    save_model(
        path,
        model,
        best.weights,
        data=run.data,
        epoch=best.epoch,
        metrics={"calibration_gated_accuracy": best.accuracy, **found},
        config=run.config,
        exit_costs=[float(cost) for cost in model.exit_costs()],
    )
