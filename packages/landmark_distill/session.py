"""One run from its command line to its record: folder, data, training, open-set test."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from landmark_distill.config import parse, plain
from landmark_distill.helpers import make_train_loader
from landmark_distill.knowledge_source import fill_store
from landmark_distill.landmark_data import LandmarkData, prepare_landmarks
from landmark_distill.model import load_weights
from landmark_distill.model_files import build, check_channels, network_of, read_model
from landmark_distill.openset_run import test_network
from landmark_distill.trainer import Trainer
from landmark_distill.utils import BEST, Record, run_folder
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.distributed import World, barrier, main_writes, start, stop
from shared_core.runs import RunFolder, UsageError, write_result
from shared_core.runs.folder import CONFIG_FILE, remove_run

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    *("resume", "fresh", "num_workers", "save_every", "log_interval", "save_dir", "device"),
    *("multi_gpu", "save_all", "knowledge", "mapped_head"),
)
OWN_KEYS = ("backbone_class", "kd_variant", "cos_margin")  # by which a run of ours is known
RESULT = "result.json"


def run_main(argv: Sequence[str] | None, *, prog: str) -> int:
    """Parse the command line and run what it asks for. Returns the exit code."""
    args = parse(argv, prog=prog)
    words = sys.argv[1:] if argv is None else list(argv)
    if args.multi_gpu and "WORLD_SIZE" not in os.environ:
        return _on_all_gpus(words)
    world = start(device=args.device)
    try:
        run(args, world, command=shlex.join([f"packages/landmark_distill/{prog}", *words]))
    finally:
        stop()
    return 0


def _on_all_gpus(words: Sequence[str]) -> int:
    """Start this command again, once for each GPU, and wait. Returns its exit code."""
    count = torch.cuda.device_count()
    if count == 0:
        raise UsageError("--multi_gpu: this machine has no GPU, expected one or more")
    from torch.distributed.run import main as torchrun

    script = Path(__file__).with_name("main.py")
    torchrun(["--standalone", f"--nproc_per_node={count}", str(script), *words])
    return 0


def run(args: argparse.Namespace, world: World, *, command: str = "") -> dict[str, Any]:
    """A whole run: train (or not), test, write the record. Returns the record's ``measured``."""
    started, clock = datetime.now(timezone.utc), time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = run_folder(args)
    folder = main_writes(lambda: _open_folder(args, path), world)
    if not args.resume == "never" and not args.test_only and (folder / RESULT).exists():
        if world.is_main:
            print(f"{folder}: finished before")
        return _finished(folder)
    data = main_writes(lambda: prepare_landmarks(args, folder), world)
    if world.is_main and data.rehearsal:
        print(_rehearsal(args))
    measured: dict[str, Any] = {}
    if args.test_only:
        best = args.init_weights
    else:
        trainer = Trainer(args, folder, data, world)
        if args.fill_knowledge:
            return _fill(args, trainer, data, world)
        measured["training"] = trainer.train()
        best = folder / BEST
        measured["parameters"] = sum(p.numel() for p in trainer.model.encoder.parameters())
    if world.is_main:
        measured |= _test(args, folder, data, best, world)
        write_result(
            folder / RESULT,
            task=f"landmark_distill/{args.dataset.lower()}",
            command=command,
            scale="rehearsal" if data.rehearsal else "full",
            data=data.facts(args.image_size),
            seeds=[args.seed],
            measured=measured,
            started=started,
            wall_seconds=time.monotonic() - clock,
        )
        if data.rehearsal:
            print(_rehearsal(args))
    barrier(world)
    return measured


def _rehearsal(args: argparse.Namespace) -> str:
    return (
        f"REHEARSAL - built-in scenes, {args.image_size} px; {args.dataset} was not used. This is "
        "not a reproduction of any published number."
    )


def _finished(folder: Path) -> dict[str, Any]:
    from shared_core.runs import read_result

    return dict(read_result(folder / RESULT)["measured"])


def _open_folder(args: argparse.Namespace, path: Path) -> Path:
    """Make the run's folder, or go on in it, as ``--resume`` and ``--fresh`` say.

    Raises:
        FileNotFoundError: ``--resume True`` and no run.
        FileExistsError: a run is there, and neither option was given.
        ValueError: the run there has other options.
    """
    if args.fresh:
        remove_run(path, keys=OWN_KEYS)
    exists = (path / CONFIG_FILE).exists()
    if args.resume == "always" and not exists:
        raise FileNotFoundError(f"nothing to resume: {path} holds no run")
    config = plain(args)
    if args.fill_knowledge or (args.test_only and exists):  # nothing of a run is changed
        path.mkdir(parents=True, exist_ok=True)
        return path
    folder = RunFolder.create(
        path, config, resume=exists and args.resume != "never", may_differ=MAY_DIFFER
    )
    return folder.path


def _fill(
    args: argparse.Namespace, trainer: Trainer, data: LandmarkData, world: World
) -> dict[str, Any]:
    """``--fill_knowledge``: every view's teacher outputs, and no training."""
    if world.world_size > 1:
        raise UsageError("--fill_knowledge writes one store: expected one process")
    views = args.views or (args.max_epoch if args.augment else 1)
    asked = fill_store(trainer.source, make_train_loader(args, data.train, world), views=views)
    print(f"stored {asked} views in {args.knowledge}, {views} an image")
    return {"stored_views": asked, "views": views}


def _test(
    args: argparse.Namespace, folder: Path, data: LandmarkData, best: Path, world: World
) -> dict[str, Any]:
    """The open-set test of a model file; its line goes to ``record.txt``."""
    weights, facts = read_model(best)
    check_channels(best, facts, bgr=args.bgr)
    network = network_of(args) if args.test_only or facts is None else facts["network"]
    if facts is not None and facts["network"]["name"] != network["name"]:
        raise UsageError(
            f"--backbone_class {network['name']}, {best} holds a {facts['network']['name']}: "
            "expected that"
        )
    model = build(network, num_classes=None)
    load_weights(model.encoder, weights, source=str(best))
    model.to(world.device).eval()
    result = test_network(
        model,
        data,
        folder,
        args=args,
        device=world.device,
        weights=weights_sha256(model.encoder.state_dict()),
    )
    Record(folder).write(result.line())
    return {"open_set": result.as_dict()}
