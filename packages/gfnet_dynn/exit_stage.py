"""The stage that gives a trained network its exits: warm-up, then gates and heads in turns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from gfnet_dynn.data_loader_helper import Data, eval_loader, train_loader
from gfnet_dynn.exit_evaluation import ExitLogits
from gfnet_dynn.finetune import BARELY_TRAIN
from gfnet_dynn.learning_helper import (
    Alternation,
    optimizer_groups,
    phases_of,
    phases_with_parameters,
)
from gfnet_dynn.model_files import PLAIN, load_model, save_model
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
from gfnet_dynn.parallel import SharedState, average_gradients, gather_outputs
from gfnet_dynn.replay import Replay
from gfnet_dynn.stages import Run, pairs
from gfnet_dynn.warmup import WarmUp, warmup_folder
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best


def confidence_folder(run: Run) -> Path:
    """The folder of exit checkpoints, named as the original names it."""
    args = run.args
    name = f"checkpoint_{run.data.name.replace(' ', '-')}_{args.ce_ic_tradeoff}_confEE"
    return run.folder / "checkpoint" / name


def train_exits(run: Run, replay: Replay | None = None) -> dict[str, Any]:
    """Stage 3: heads warm up one by one, then gates and heads (or the backbone) take turns.

    The best model by gated accuracy on the calibration split, under the policy that will be
    deployed, goes to ``checkpoint/best/`` as well.

    Args:
        replay: embeddings of a backbone that stays frozen, to take and to add to; one seed's.
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
        )
        if run.world.is_main
        else None,
    )
    phases = phases_with_parameters(model, phases_of(args.phase2))
    alternation = Alternation(args.bilevel_batch_count, phases=phases)
    loader = train_loader(
        data, args, stage="exits", batch_size=args.batch, device=run.device, **run.share
    )
    average_gradients(model, run.world)
    total = len(data.image_set("calibration"))

    def gather(found: ExitLogits) -> ExitLogits:
        return gather_outputs(found, run.world, total=total)

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
    state = SharedState("exits", parts, run.log, run.world)
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
        calibration = eval_loader(data, "calibration", args, device=run.device, **run.share)
        batches = pairs(loader, f"exits epoch {epoch + 1}/{args.num_epoch}")
        checked = pairs(calibration, "calibration split")
        if replay is not None:
            network = {"network": facts["sha256"], "precision": training.precision}
            batches = replay.batches(epoch, batches, model, **network)
            checked = replay.batches("calibration", checked, model, **network)
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
                gather=gather,
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
                gather=gather,
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
    if run.world.is_main:
        final = run.folder / "checkpoint" / "best" / best_name
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(confidence_folder(run) / best_name, final)
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
    if not run.world.is_main:
        return
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
