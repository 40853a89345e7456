"""The stage that gives a trained network its exits, and the names of the files that it leaves.

Warm-up: the heads learn, each until its patience is out. Phase 2: gates and heads (or the backbone)
take turns. Under ``checkpoint/`` lie, named as the original names them:

- ``_warmup/{set}_{size}_{lambda}/{block}.pth``: the best weights of each head from the warm-up;
- ``checkpoint_{set}_{lambda}_confEE/ckpt_{set}_{epoch}__{lambda}__{accuracy}.pth``: the models that
  were the best so far, with their gated accuracy on the calibration split, in percent;
- ``best/``: the last of these, the finished model.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gfnet_dynn.choices import LEARNED_RULES
from gfnet_dynn.decide.exit_outputs import ExitLogits
from gfnet_dynn.model_files import PLAIN, STAGED, check_fits, load_model, save_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.run import Run, pairs
from gfnet_dynn.train.exit_training import (
    ExitTraining,
    evaluate,
    train_single_epoch,
    warm_up_epoch,
)
from gfnet_dynn.train.finetune import BARELY_TRAIN
from gfnet_dynn.train.parallel import gather_outputs
from gfnet_dynn.train.phases import (
    Alternation,
    optimizer_groups,
    phases_of,
    phases_with_parameters,
)
from gfnet_dynn.train.replay import Replay
from gfnet_dynn.train.warmup import WarmUp
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import StageState

BARELY_EVALUATE = 51  # batches of the calibration split under --barely_train
Batches = Iterator[tuple[Tensor | list[Tensor], Tensor]]


def warmup_folder(run: Run) -> Path:
    """The folder of the warm-up's heads."""
    name = f"{run.data.file_name}_{run.data.input_size}_{run.settings.exits.ce_ic_tradeoff}"
    return run.folder / "checkpoint" / "_warmup" / name


def confidence_folder(run: Run) -> Path:
    """The folder of the models that were the best so far."""
    name = f"checkpoint_{run.data.file_name}_{run.settings.exits.ce_ic_tradeoff}_confEE"
    return run.folder / "checkpoint" / name


def checkpoint_name(run: Run, epoch: int, gated_accuracy: float) -> str:
    """The file name of a model of phase 2; ``gated_accuracy`` is a fraction."""
    tradeoff = run.settings.exits.ce_ic_tradeoff
    return f"ckpt_{run.data.file_name}_{epoch}__{tradeoff}__{round(100 * gated_accuracy, 2)}.pth"


def best_file(run: Run, name: str) -> Path:
    """The finished model."""
    return run.folder / "checkpoint" / "best" / name


class BestExits:
    """The weights with the least mean level loss so far; the first of equals stays.

    Gated accuracy would not do: while gates have learned nothing, nobody leaves and nothing is
    lost, so an epoch that saves nothing would win. The level loss has the price of compute in it.
    """

    def __init__(self) -> None:
        self.level_loss, self.gated_accuracy, self.epoch = math.inf, 0.0, -1
        self.weights: dict[str, Tensor] = {}

    def offer(self, model: nn.Module, found: Mapping[str, float], epoch: int) -> bool:
        """Keep a copy of ``model``'s weights when they are better; say whether they were."""
        if not found["level_loss"] < self.level_loss:
            return False
        self.level_loss, self.gated_accuracy = found["level_loss"], found["gated_acc"]
        self.epoch = epoch
        self.weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        vars(self).update(state)


def train_exits(run: Run, replay: Replay | None = None) -> dict[str, Any]:
    """Stage 3: heads warm up one by one, then gates and heads (or the backbone) take turns.

    The model with the least level loss on the calibration split, under the policy that will be
    deployed, goes to ``checkpoint/best/`` as well.

    Args:
        replay: embeddings of a backbone that stays frozen, to take and to add to; one seed's.

    Returns:
        What the run's log keeps of the stage.
    """
    run.seed("exits")
    return _ExitStage(run, replay).run()


class _ExitStage:
    """The parts of the stage, and the loop over its epochs."""

    def __init__(self, run: Run, replay: Replay | None) -> None:
        wanted = run.settings.exits
        self.owner, self.wanted, self.replay = run, wanted, replay
        below = "backbone" if run.settings.networks.no_distil else "student"
        source = run.settings.checkpoint or run.file(below)
        backbone, facts = load_model(source)
        if facts["architecture"] != STAGED:
            backbone, facts = load_model(source, architecture=PLAIN)
        check_fits(source, backbone, facts, run.data)
        self.network = facts["sha256"]
        exits = wanted.blocks(backbone.depth)
        self.model = GFNetDynn(backbone, exits, gate=wanted.gate).to(run.device)
        groups = optimizer_groups(self.model, lr=wanted.lr, gate_lr=wanted.gate_lr)
        optimizer = torch.optim.SGD(groups, lr=wanted.lr, momentum=0.9, weight_decay=wanted.wd)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=wanted.num_epoch, eta_min=min(wanted.min_lr, wanted.lr)
        )
        self.training = ExitTraining(
            self.model,
            optimizer,
            tradeoff=wanted.ce_ic_tradeoff,
            objective=wanted.gate_objective,
            classifier_mode=wanted.classifier_loss,
            precision=Precision(run.device, run.precision),
            world=run.world,
        )
        self.warm_up = WarmUp(
            exits,
            patience=wanted.patience,
            max_epochs=wanted.max_warmup_epoch,
            folder=warmup_folder(run) if run.world.is_main else None,
        )
        phases = phases_with_parameters(self.model, phases_of(wanted.phase2))
        self.alternation = Alternation(wanted.bilevel_batch_count, phases=phases)
        self.loader = run.student_batches("exits", batch_size=wanted.batch)
        self.best = BestExits()
        self.policy = ExitPolicy(_judged_rule(run), 0.5)
        limits = (BARELY_TRAIN, BARELY_EVALUATE) if wanted.barely_train else (None, None)
        self.most_batches, self.most_held = limits
        self.state = StageState("exits", self._parts(optimizer), run.log, world=run.world)

    def _parts(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a killed try goes on from."""
        return {
            "model": self.model,
            "optimizer": optimizer,
            "scheduler": self.scheduler,
            "training": self.training,
            "warm_up": self.warm_up,
            "alternation": self.alternation,
            "loader": self.loader,
            "best": self.best,
            "precision": self.training.precision,
        }

    def run(self) -> dict[str, Any]:
        """All epochs, then the finished model."""
        first = 0
        if self.state.restore():
            first = self.state.counters["epoch"]
            self.owner.log.say(f"exits: resumed at epoch {first + 1}")
        else:
            self.state.save(epoch=0)
        for epoch in range(first, self.wanted.num_epoch):
            self._epoch(epoch)
            self.state.save(epoch=epoch + 1)
        if self.best.epoch < 0:
            raise ValueError(
                f"exits: the level loss was no number in any of {self.wanted.num_epoch} epochs; "
                "a lower learning rate may help"
            )
        name = checkpoint_name(self.owner, self.best.epoch, self.best.gated_accuracy)
        if self.owner.world.is_main:
            final = best_file(self.owner, name)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(confidence_folder(self.owner) / name, final)
        return {
            "calibration_gated_accuracy": self.best.gated_accuracy,
            "calibration_level_loss": self.best.level_loss,
            "epoch": self.best.epoch,
            "warm_up_epochs": self.warm_up.epoch,
            "file": name,
            "seconds": self.state.seconds,
        }

    def _epoch(self, epoch: int) -> None:
        batches, held = self._batches(epoch)
        in_warm_up = not self.warm_up.done
        if in_warm_up:
            trained, found = warm_up_epoch(
                self.training,
                self.warm_up,
                batches,
                held,
                max_batches=self.most_batches,
                max_validation_batches=self.most_held,
                split_hash=self.owner.data.manifest.hash,
                gather=self._gather,
            )
        else:
            trained, found = self._phase2_epoch(epoch, batches, held)
        self.loader.loader.order.set_epoch(epoch + 1)  # also when batches were left out
        log = self.owner.log
        log.write("exits", "train", epoch, trained)
        log.write("exits", "val", epoch, found)
        log.say(self._line(epoch, found, in_warm_up=in_warm_up))

    def _batches(self, epoch: int) -> tuple[Batches, Batches]:
        """Training and calibration batches; embeddings where they are replayed."""
        run, total = self.owner, self.wanted.num_epoch
        held_loader = run.loaders(shared=True).held("calibration")
        batches = pairs(self.loader, f"exits epoch {epoch + 1}/{total}")
        held = pairs(held_loader, "calibration split")
        if self.replay is None:
            return batches, held
        network = {"network": self.network, "precision": self.training.precision}
        return (
            self.replay.batches(epoch, batches, self.model, **network),
            self.replay.batches("calibration", held, self.model, **network),
        )

    def _phase2_epoch(
        self, epoch: int, batches: Batches, held: Batches
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Turns of the phases, then the calibration split under the policy."""
        heads_learn = self.wanted.phase2 in ("exits", "joint")
        self.training.frozen_exits = () if heads_learn else tuple(range(self.model.num_gates))
        turns = train_single_epoch(
            self.training, batches, alternation=self.alternation, max_batches=self.most_batches
        )
        found, outputs = evaluate(
            self.training,
            held,
            policy=self.policy,
            split_hash=self.owner.data.manifest.hash,
            max_batches=self.most_held,
            gather=self._gather,
        )
        self.training.set_from_validation(outputs)
        self.scheduler.step()
        if self.best.offer(self.model, found, epoch) and self.owner.world.is_main:
            self._save(found)
        return {k: v for values in turns.values() for k, v in values.items()}, found

    def _gather(self, found: ExitLogits) -> ExitLogits:
        run = self.owner
        return gather_outputs(found, run.world, total=len(run.data.image_set("calibration")))

    def _save(self, found: Mapping[str, float]) -> None:
        best, run = self.best, self.owner
        save_model(
            confidence_folder(run) / checkpoint_name(run, best.epoch, best.gated_accuracy),
            self.model,
            best.weights,
            data=run.data,
            epoch=best.epoch,
            metrics={"calibration_gated_accuracy": best.gated_accuracy, **found},
            config=run.config,
            exit_costs=[float(cost) for cost in self.model.exit_costs()],
        )

    def _line(self, epoch: int, found: Mapping[str, float], *, in_warm_up: bool) -> str:
        settled = f"{len(self.warm_up.frozen_exits)}/{self.model.num_gates} exits settled"
        if in_warm_up:
            what = f"warm-up, {settled}"
        else:
            what = (
                f"{self.wanted.phase2}, level loss {found['level_loss']:.4f}, gated accuracy "
                f"{found['gated_acc']:.4f} at {100 * found['cost_fraction']:.1f} % of the MACs"
            )
        heads = " ".join(f"{found[f'acc{block}']:.3f}" for block in self.model.exits)
        return (
            f"exits: epoch {epoch + 1}/{self.wanted.num_epoch} {what}, exits {heads} final "
            f"{found['acc_final']:.3f}"
        )


def _judged_rule(run: Run) -> str:
    """The rule that chooses epochs: the deployed one, or for patience one that has scores."""
    rule = run.settings.judging.policy
    if rule != "patience":
        return rule
    return LEARNED_RULES[0] if run.settings.exits.gate == "unc" else "max_prob"
