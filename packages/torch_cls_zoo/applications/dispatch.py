"""From the command line to the modes: train first, then what is to be done with the weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

import torch

from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.distributed import World, main_writes
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import OpenRun, derive_seed, open_run
from shared_core.runs.lock import RunLock
from shared_core.weights.finding import NONE
from torch_cls_zoo.applications.convert import convert
from torch_cls_zoo.applications.evaluate import evaluate
from torch_cls_zoo.applications.find_lr import find_lr
from torch_cls_zoo.applications.floor import Floors, measure_floors, wants_floors
from torch_cls_zoo.applications.launch import launch
from torch_cls_zoo.applications.session import Session, open_session, settled
from torch_cls_zoo.applications.teach import make_curriculum, make_knowledge
from torch_cls_zoo.applications.train import Trained, train
from torch_cls_zoo.applications.visualize import visualize
from torch_cls_zoo.config import Config
from torch_cls_zoo.models import build_model
from torch_cls_zoo.models.summary import format_summary, summarize
from torch_cls_zoo.options import DEFAULT_ARCH, OPTIONS

RUN_KEYS = {"arch", "curriculum_learning", "hard_ratio", "multi_scale"}  # tell our runs by


def run_main(config: Config) -> int:
    """Do what the command line asks for. Returns the exit code."""
    if not config.run.modes:
        return print_summary(config)
    return launch(config, run)


def print_summary(config: Config) -> int:
    """The network's layers; the README's way to look at a model. Needs no data."""
    size = config.data.image_size or (224, 224)
    built = build_model(
        config.network.arch or DEFAULT_ARCH,
        num_classes=config.data.num_classes or 6,
        init=config.network.resume or NONE,
        image_size=size,
    )
    for note in built.notes:
        print(f"note: {note}")
    print(format_summary(summarize(built.model, size)))
    return 0


def run(config: Config, world: World, *, data: PreparedData | None = None) -> dict[str, Any]:
    """What one process does: train or use a network, with the run's folder locked.

    Args:
        data: images that are open already, for many runs on the same.

    Returns:
        The numbers of training and test, where there are any.
    """
    config, lacking = settled(config, world)
    with _opened(config, world) as opened:
        if opened is not None:
            config = config.continued(opened.config)
        if lacking is not None and config.network.init == NONE and world.is_main:
            print(f"no trained weights to start from, so from nothing: {lacking}", file=sys.stderr)
        if config.processes.threads:
            torch.set_num_threads(config.processes.threads)
        # Before the network is made: its first weights come from here. With several processes the
        # main one's weights are copied to the others; what they draw later must differ.
        seed_all(derive_seed(config.data.seed, "process", world.rank) % 2**32)
        return _work(config, world, opened, data)


@contextmanager
def _opened(config: Config, world: World) -> Iterator[OpenRun | None]:
    """The run of a training; for anything else the folder is only locked, and None."""
    if not config.run.trains:
        with ExitStack() as held:
            lock = RunLock(config.run.output)
            main_writes(lambda: held.enter_context(lock) and None, world)
            yield None
        return
    stored = {**config.stored(), "processes": world.world_size}
    stored["threads"] = stored["threads"] or None  # 0: torch decides, as at the first start
    usual = {name: row.default for name, row in OPTIONS.items() if row.in_config}
    usual["init"] = config.network.init
    with open_run(
        config.run.output,
        stored,
        keys=RUN_KEYS,
        start=config.run.start,
        may_differ=[name for name, row in OPTIONS.items() if row.may_differ],
        kept=[name for name in usual if not OPTIONS[name].may_differ],
        usual={**usual, "threads": torch.get_num_threads()},
        world=world,
        main_writes=main_writes,
    ) as opened:
        yield opened


def _work(
    config: Config, world: World, opened: OpenRun | None, data: PreparedData | None
) -> dict[str, Any]:
    started, clock = datetime.now(timezone.utc), time.monotonic()
    session = open_session(config, world, data=data)
    if config.network.summary and world.is_main:
        print(format_summary(summarize(session.model, session.settings.size)))
    result: dict[str, Any] = {}
    asked = config.teaching
    if config.training.find_lr:
        result["learning rate"] = find_lr(session)
    if opened is not None:
        trained = train(session, opened)
        result["training"] = _training_facts(session, trained)
        session.say(
            f"best weights of epoch {trained.best_epoch + 1} (val {trained.best_accuracy:.4f}): "
            f"{trained.best}; last: {trained.last}"
        )
    floors = None
    if opened is not None and wants_floors(session.data, config.run.floor):
        floors = session.only_main(lambda: _floors_of(session))
        result["floor"] = floors.facts()
    if opened is not None or "evaluate" in config.run.modes:
        result["test"] = evaluate(
            session,
            session.output,
            started=started if opened is None else opened.started,
            seconds=time.monotonic() - clock if opened is None else opened.seconds,
            training=result.get("training"),
            floors=floors,
        )
    if asked.knowledge:
        result["knowledge"] = make_knowledge(session, asked.knowledge)
    if asked.make_curriculum:
        result["curriculum"] = make_curriculum(session, asked.make_curriculum)
    if config.pictures.visual_data:
        result["pictures"] = visualize(session)
    if {"jit", "export"} & set(config.run.modes):
        result["files"] = convert(session)
    if floors is not None:
        session.say(floors.verdict(result["test"]))
    return result


def _floors_of(session: Session) -> Floors:
    return measure_floors(
        session.data,
        side=max(session.settings.size),
        threads=session.config.data.workers,
        device=session.world.device,
        say=session.say,
    )


def _training_facts(session: Session, trained: Trained) -> dict[str, Any]:
    """What the record and the report say of the training."""
    return {
        "arch": session.arch,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "criterion": session.family,
        "recipe": session.config.training.recipe,
        "started_from": session.start or {"name": "none"},
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch + 1,
        "val_accuracy": trained.best_accuracy,
        "unreadable": trained.unreadable,
        "processes": session.world.world_size,
        "seconds": trained.seconds,
        **({"batch_norm_scales": trained.slimmed} if trained.slimmed else {}),
    }
