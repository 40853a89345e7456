"""Training: epochs, validation, best and last weights, and a state to go on from exactly."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_core.checkpoints import make_facts
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.for_torch.distributed import (
    all_mean,
    gather_objects,
    main_writes,
    share_buffers,
    unwrap,
    wrap,
)
from shared_core.for_torch.run_state import Best, StageState
from shared_core.runs import OpenRun, UsageError
from shared_core.runs.progress import format_seconds
from torch_cls_zoo.applications.learn import Sums, run_epoch
from torch_cls_zoo.applications.prepare import make_learner
from torch_cls_zoo.applications.probe import start_head
from torch_cls_zoo.applications.session import PROJECT, Session
from torch_cls_zoo.applications.test import Outputs, measure, plain_criterion, run_network
from torch_cls_zoo.config import resolved
from torch_cls_zoo.dataloader.folders import part
from torch_cls_zoo.dataloader.loaders import eval_loader
from torch_cls_zoo.models.blocks import body_blocks
from torch_cls_zoo.options import OPTIONS
from torch_cls_zoo.pruning.slimming import slimming_note, slimming_reach, sparsity_facts
from torch_cls_zoo.utils.tensorboard_log import TensorBoardLog


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    best: Path  # weights with the best validation accuracy
    last: Path
    best_epoch: int  # from 0
    best_accuracy: float  # validation, fraction in [0, 1]
    epochs: int
    seconds: float
    unreadable: int  # training images that could not be read in the last epoch
    slimmed: dict[str, float]  # of the batch-norm scales at the end; empty without --sparsity


def train(session: Session, run: OpenRun) -> Trained:
    """Train the session's network; afterwards it holds the best weights.

    Args:
        run: the open run, whose log gets the numbers.

    Raises:
        ValueError: options that do not fit together, a loss that is not finite.
    """
    return Training(session, run).run()


class Training:
    """One run: its parts, its state on disk, and the loop over the epochs."""

    def __init__(self, session: Session, run: OpenRun) -> None:
        asked = session.config.training
        self.session, self.open_run, self.asked = session, run, asked
        self.learner, self.loader, self.schedule = make_learner(session)
        self.part = part(session.data, "val")
        self.validation = eval_loader(
            self.part.images,
            session.settings,
            batch_size=session.batch_size,
            world=session.world,
            threads=session.config.data.workers,
        )
        self.best, self.sums, self.epoch, self.unreadable = Best(), Sums(), 0, 0
        self.plain = plain_criterion(session)
        if asked.unfreeze and session.world.world_size > 1:
            raise UsageError("--unfreeze runs in one process: leave out --gpus and torchrun")
        self.blocks = body_blocks(session.model, len(session.classes)) if asked.unfreeze else []
        parts = {
            "model": session.model,
            "criterion": self.learner.criterion,
            "optimizer": self.learner.optimizer,
            "schedule": self.schedule,
            "precision": self.learner.precision,
            "loader": self.loader,
            "best": self.best,
        }
        if self.learner.ema is not None:
            parts["ema"] = self.learner.ema
        self.state = StageState("train", parts, run.log, world=session.world)

    def run(self) -> Trained:
        """From the saved state, or from the start, to the last epoch."""
        session, world = self.session, self.session.world
        self._restore()
        if self.asked.sparsity:
            self._say_reach()
        # After the state is back: wrapping copies the weights to the other processes.
        model = session.model
        self.learner.model = wrap(torch.compile(model) if self.asked.compile else model, world)
        self.board = TensorBoardLog(
            session.config.run.logdir, enabled=world.is_main, first_step=self.epoch
        )
        started, begun = time.monotonic(), self.epoch
        try:
            while self.epoch < self.asked.epochs and not self._gives_up():
                if self.asked.unfreeze:
                    self._open()
                try:
                    self._learn()
                except torch._dynamo.exc.TorchDynamoException as error:
                    reason = " ".join(str(error).split())[:200]
                    raise UsageError(f"--compile: not possible here ({reason})") from error
                line = self._close_epoch()
                each = (time.monotonic() - started) / (self.epoch - begun)
                left = format_seconds(each * (self.asked.epochs - self.epoch))
                session.say(f"{line}, {left} left")
        finally:
            self.board.close()
        return self._finish()

    def _gives_up(self) -> bool:
        """Whether validation has not become better for so long that no more epochs are tried."""
        waited = self.epoch - 1 - self.best.epoch
        if not self.asked.patience or waited < self.asked.patience:
            return False
        self.session.say(f"stopped early: no better validation in {waited} epochs")
        return True

    def _open(self) -> None:
        """Let as much of the body learn as the epoch's turn is, the last blocks first."""
        opened = math.ceil(len(self.blocks) * min(1, self.epoch / self.asked.unfreeze))
        for number, parameters in enumerate(reversed(self.blocks)):
            for parameter in parameters:
                parameter.requires_grad_(number < opened)
        self.session.say(f"epoch {self.epoch + 1}: {opened} of {len(self.blocks)} blocks learn")

    def _restore(self) -> None:
        session = self.session
        if not self.state.restore():
            main_writes(self.open_run.log.begin, session.world)
            if self.asked.probe:
                start_head(session)
                if (ema := self.learner.ema) is not None:  # it begins where the weights do
                    ema.load_state_dict({**ema.state_dict(), "weights": session.model.state_dict()})
                self._offer_start()
                self._save()
            return
        counters = self.state.counters
        self.epoch, self.unreadable = counters["epoch"], counters["unreadable"]
        self.sums = Sums(**counters["sums"][session.world.rank])
        session.say(f"going on at epoch {self.epoch + 1}, batch {self.sums.batches + 1}")

    def _offer_start(self) -> None:
        """The network as the probe leaves it is the first to beat: tuning may not end below it."""
        session = self.session
        outputs = run_network(session.model, self.validation, self.part, session.world)
        values = measure(outputs, self.plain, num_classes=len(session.classes))
        self.best.offer(session.model, values["accuracy"], -1)
        main_writes(lambda: self._write_weights(values, True), session.world)

    def _save(self) -> None:
        """Write the whole state; all processes call this at the same place."""
        self.sums.settle()
        share_buffers(self.session.model, self.session.world)
        self.state.save(
            epoch=self.epoch,
            sums=gather_objects(self.sums.plain(), self.session.world),
            unreadable=self.unreadable,
        )
        self.open_run.mark()

    def _learn(self) -> None:
        """The rest of an epoch."""
        asked, total = self.asked, len(self.loader)
        self.rate = self.schedule.set_epoch(self.epoch)
        first = self.epoch * total
        for sums in run_epoch(
            self.learner, self.loader, self.sums, first_number=first, schedule=self.schedule
        ):
            if sums.batches % asked.print_freq == 0 and sums.batches < total:
                sums.settle()
                self.session.say(
                    f"epoch {self.epoch + 1}, batch {sums.batches}/{total}: loss "
                    f"{sums.mean_loss():.4f}, accuracy {sums.accuracy():.4f}"
                )
            if asked.save_every and sums.batches % asked.save_every == 0:
                self._save()

    def _close_epoch(self) -> str:
        """Validate, log, keep the best, write everything. Returns a line for the user."""
        session, world = self.session, self.session.world
        self.sums.settle()
        trained = sums_of_all(self.sums, session)
        with self._judged() as model:
            share_buffers(model, world)
            outputs = run_network(model, self.validation, self.part, world)
            values = measure(outputs, self.plain, num_classes=len(session.classes))
            improved = self.best.offer(model, values["accuracy"], self.epoch)
            if world.is_main:
                self._log(trained, values, outputs if improved else None)
            self.unreadable = len(self.sums.unreadable)
            self.epoch, self.sums = self.epoch + 1, Sums()
            main_writes(lambda: self._write_weights(values, improved), world)
        self._save()
        return (
            f"epoch {self.epoch}/{self.asked.epochs}: lr {self.rate:.3g}, loss "
            f"{trained['loss']:.4f}, train accuracy {trained['accuracy']:.4f}, val "
            f"{values['accuracy']:.4f} (best {self.best.accuracy:.4f} of epoch "
            f"{self.best.epoch + 1})"
        )

    def _judged(self) -> AbstractContextManager[nn.Module]:
        """The network as it is validated and kept: with the averaged weights, if there are any."""
        model, ema = self.session.model, self.learner.ema
        return nullcontext(model) if ema is None else ema.applied(model)

    def _log(self, trained: dict[str, Any], values: dict[str, Any], shown: Outputs | None) -> None:
        session, epoch, log = self.session, self.epoch, self.open_run.log.metrics
        numbers = {k: v for k, v in values.items() if k != "confusion"}
        log.write({"split": "train", "epoch": epoch, "lr": self.rate, **trained})
        log.write({"split": "val", "epoch": epoch, **numbers})
        self.board.scalars(
            {
                "Train/Loss": trained["loss"],
                "Train/Accuracy": trained["accuracy"],
                "Val/Loss": values["loss"],
                "Val/Accuracy": values["accuracy"],
                "learning rate": self.rate,
            },
            epoch,
        )
        if session.config.run.histograms:
            self.board.gammas(session.model, epoch)
        if shown is not None:
            self.board.confusion(values["confusion"], session.classes, epoch)
            self.board.predictions(shown, session.classes, session.settings.size, epoch)

    def _write_weights(self, values: dict[str, Any], improved: bool) -> None:
        """The last weights each epoch, the best when they are new."""
        files = weight_files(self.session)
        files["last"].parent.mkdir(parents=True, exist_ok=True)
        facts = facts_of(self.session, self.epoch, values)
        save_checkpoint(files["last"], unwrap(self.session.model).state_dict(), facts)
        if improved or not files["best"].exists():
            best = {**facts, "epoch": self.best.epoch + 1}
            save_checkpoint(files["best"], self.best.weights, best)

    def _say_reach(self) -> None:
        """Whether slimming can get anywhere in this training."""
        rates = [self.asked.lr * self.schedule.factor(n) for n in range(self.asked.epochs)]
        steps = math.ceil(len(self.loader) / self.asked.accumulate)
        reach = slimming_reach(rates, steps, self.asked.slim)
        if (note := slimming_note(reach, self.asked.slim)) is not None:
            self.session.say(note)

    def _finish(self) -> Trained:
        session, slimmed = self.session, {}
        if self.asked.sparsity:
            slimmed = sparsity_facts(session.model)
            session.say(
                f"batch-norm scales: {slimmed['near_zero']:.1%} of {slimmed['gammas']:.0f} below "
                f"0.01, median {slimmed['median']:.3f}, mean {slimmed['mean']:.3f}"
            )
        session.model.load_state_dict(self.best.weights)
        files = weight_files(session)
        return Trained(
            best=files["best"],
            last=files["last"],
            best_epoch=self.best.epoch,
            best_accuracy=self.best.accuracy,
            epochs=self.epoch,
            seconds=self.state.seconds,
            unreadable=self.unreadable,
            slimmed=slimmed,
        )


def sums_of_all(sums: Sums, session: Session) -> dict[str, Any]:
    """The epoch's loss and accuracy over all processes."""
    world = session.world
    return {
        "loss": all_mean(sums.mean_loss(), world, weight=sums.images),
        "accuracy": all_mean(sums.accuracy(), world, weight=sums.images),
        "images": sum(gather_objects(sums.images, world)),
        "unreadable": len(sums.unreadable),
    }


def weight_files(session: Session) -> dict[str, Path]:
    """Where the best and the last weights lie."""
    folder, name = session.output / "checkpoints", session.arch.replace("/", "_")
    return {"best": folder / f"model_best_{name}.pth", "last": folder / f"checkpoint_{name}.pth"}


def facts_of(session: Session, epochs: int, values: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the weights."""
    asked = resolved(session.config.values)
    config = {
        name: str(asked[name]) if isinstance(asked[name], Path) else asked[name]
        for name, row in OPTIONS.items()
        if row.in_facts
    }
    return make_facts(
        project=PROJECT,
        architecture=session.arch,
        class_names=session.classes,
        framework="torch",
        input_size=(3, *session.settings.size),
        mean=session.settings.mean,
        std=session.settings.std,
        epoch=epochs,
        metrics={"val_accuracy": values["accuracy"], "val_loss": values["loss"]},
        split_hash=session.data.manifest.hash,
        started_from=session.start,
        config={
            **config,
            "epochs": session.config.training.epochs,
            "batch_size": session.batch_size,
            "criterion": session.family,
        },
        **({"pruned": session.kept} if session.kept else {}),
    )
