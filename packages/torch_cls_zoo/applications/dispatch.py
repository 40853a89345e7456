"""From the command line to the modes: train first, then what is to be done with the weights."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.distributed import World
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import RunFolder, UsageError, derive_seed
from shared_core.runs.folder import CONFIG_FILE, remove_run
from torch_cls_zoo.applications.convert import convert
from torch_cls_zoo.applications.evaluate import evaluate
from torch_cls_zoo.applications.find_lr import find_lr
from torch_cls_zoo.applications.launch import launch
from torch_cls_zoo.applications.session import Session, only_main, open_session
from torch_cls_zoo.applications.teach import make_curriculum, make_knowledge
from torch_cls_zoo.applications.train import Trained, train
from torch_cls_zoo.applications.visualize import visualize
from torch_cls_zoo.config import DEFAULT_ARCH, parse
from torch_cls_zoo.models import build_model
from torch_cls_zoo.utils.summary import format_summary, summarize

# What does not change a run's result, so that a run that goes on may say something else.
MAY_DIFFER = (
    "workers", "print_freq", "save_every", "logdir", "summary", "histograms", "evaluate", "jit",
    "knowledge", "knowledge_name", "visual_data", "visual_method", "visual_layer",
    "visual_number", "make_curriculum", "curriculum_thresholds", "curriculum_weights",
    "init_method", "rank", "nodes", "gpus",
)  # fmt: skip
NOT_IN_CONFIG = ("given", "modes", "exact", "fresh", "output", "arch_given", "command")
RUN_KEYS = {"arch", "curriculum_learning", "hard_ratio", "multi_scale"}  # tell our runs by


def run_main(argv: Sequence[str] | None, *, prog: str) -> int:
    """Parse the command line and do what it asks for. Returns the exit code."""
    args = parse(argv, prog=prog)
    words = sys.argv[1:] if argv is None else list(argv)
    args.command = shlex.join([f"packages/torch_cls_zoo/{prog}", *words])
    if not args.train and not args.modes and not args.find_lr:
        return print_summary(args)
    return launch(args, work)


def print_summary(args: argparse.Namespace) -> int:
    """The network's layers; the README's way to look at a model. Needs no data."""
    size = tuple(args.image_size or (224, 224))
    built = build_model(
        args.arch or DEFAULT_ARCH,
        num_classes=args.num_classes or 6,
        pretrained=args.resume,
        image_size=(size[0], size[1]),
    )
    for note in built.notes:
        print(f"note: {note}")
    print(format_summary(summarize(built.model, (size[0], size[1]))))
    return 0


def work(args: argparse.Namespace, world: World) -> None:
    """What one process does; ``args`` are those of :func:`torch_cls_zoo.config.parse`."""
    run(args, world)


def run(
    args: argparse.Namespace, world: World, *, data: PreparedData | None = None
) -> dict[str, Any]:
    """Train or use a network. Returns the numbers of training and test, where there are any.

    Args:
        data: images that are open already, for many runs on the same.
    """
    started, clock = datetime.now(timezone.utc), time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Before the network is made: its first weights come from here. With several processes the
    # main one's weights are copied to the others; what they draw later must differ.
    seed_all(derive_seed(args.seed, "process", world.rank) % 2**32)
    if args.logdir is None:
        args.logdir = args.output / "logs"
    result: dict[str, Any] = {}
    if args.train:
        _open_run(args, world)
    session = open_session(args, world, data=data)
    if args.summary and world.is_main:
        print(format_summary(summarize(session.model, session.settings.size)))
    if args.find_lr:
        if world.world_size > 1:
            raise UsageError("--find_lr runs in one process: leave out --gpus and torchrun")
        result["learning rate"] = find_lr(session)
    training: dict[str, Any] | None = None
    if args.train:
        trained = train(session)
        training = _training_facts(session, trained)
        result["training"] = training
        session.say(
            f"best weights of epoch {trained.best_epoch + 1} (val {trained.best_accuracy:.4f}): "
            f"{trained.best}; last: {trained.last}"
        )
    if args.train or args.evaluate:
        seconds = training["seconds"] if training else time.monotonic() - clock
        result["test"] = evaluate(
            session,
            args.output,
            command=args.command,
            started=started,
            seconds=seconds,
            training=training,
        )
    if args.knowledge:
        result["knowledge"] = make_knowledge(session, args.knowledge)
    if args.make_curriculum:
        result["curriculum"] = make_curriculum(session, args.make_curriculum)
    if args.visual_data:
        result["pictures"] = visualize(session)
    if args.jit:
        result["files"] = convert(session)
    return result


def _open_run(args: argparse.Namespace, world: World) -> None:
    """The run's folder: new, or gone on with exactly."""
    config_file: Path = args.output / CONFIG_FILE

    def prepare() -> None:
        if args.fresh and args.output.exists():
            remove_run(args.output, keys=RUN_KEYS)
        if args.exact and not config_file.exists():
            raise FileNotFoundError(f"--resume: {args.output} holds no run to go on with")

    only_main(world, prepare)
    if args.exact:
        _take_over(args, json.loads(config_file.read_text(encoding="utf-8")))
    plain = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in NOT_IN_CONFIG
    }
    plain["processes"] = world.world_size
    if not args.threads:
        plain["threads"] = torch.get_num_threads()
    only_main(
        world,
        lambda: RunFolder.create(args.output, plain, resume=args.exact, may_differ=MAY_DIFFER),
    )


def _take_over(args: argparse.Namespace, stored: dict[str, Any]) -> None:
    """What a command that goes on does not say is as the run began."""
    for key, value in stored.items():
        if hasattr(args, key) and key not in args.given and key not in MAY_DIFFER:
            known = getattr(args, key)
            setattr(args, key, Path(value) if isinstance(known, Path) and value else value)
    for key in ("knowledge_dir", "class_matrices", "quarantine"):
        value = getattr(args, key)
        if value is not None:
            setattr(args, key, Path(value))
    if args.threads:
        torch.set_num_threads(args.threads)


def _training_facts(session: Session, trained: Trained) -> dict[str, Any]:
    """What the record and the report say of the training."""
    return {
        "arch": session.arch,
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "criterion": session.family,
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch + 1,
        "val_accuracy": trained.best_accuracy,
        "unreadable": trained.unreadable,
        "processes": session.world.world_size,
        "seconds": trained.seconds,
    }
