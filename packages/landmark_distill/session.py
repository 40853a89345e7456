"""One run from its command line to its record: folder, data, training, open-set test."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from landmark_distill.config import AUTO, RunConfig
from landmark_distill.gallery.embedder import asked_facts, embedder_of, file_facts
from landmark_distill.gallery.features import FEATURE_FILE, extract_features, load_features
from landmark_distill.helpers import make_train_loader
from landmark_distill.images.landmark_data import LandmarkData, prepare_landmarks
from landmark_distill.judging.judge import OpenSetResult, openset_test, write_results
from landmark_distill.judging.trained_features import (
    fine_numbers,
    trained_features,
    verdict,
)
from landmark_distill.model import load_weights
from landmark_distill.model_files import build, check_channels, read_model
from landmark_distill.teacher import fill_store
from landmark_distill.trainer import Trainer
from landmark_distill.utils import BEST, Record
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.distributed import (
    World,
    barrier,
    main_works,
    main_writes,
    start,
    stop,
)
from shared_core.for_torch.precision import Precision
from shared_core.runs import OpenRun, RunLock, UsageError, open_run, read_result, write_result

# What does not change a run's result, so that a resumed run may say something else.
MAY_DIFFER = (
    *("resume", "go_on", "fresh", "workers", "save_every", "log_interval", "save_dir", "output"),
    *("device", "multi_gpu", "save_all", "knowledge", "mapped_head"),
)
OWN_KEYS = ("backbone_class", "kd_variant", "cos_margin")  # by which a run of ours is known
RESULT = "result.json"


def run_main(config: RunConfig, words: Sequence[str]) -> int:
    """Run what the command line asks for. Returns the exit code."""
    if config.multi_gpu and "WORLD_SIZE" not in os.environ:
        return _on_all_gpus(words)
    world = start(device=config.device)
    try:
        run(config, world, command=shlex.join(["packages/landmark_distill/main.py", *words]))
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


def run(
    config: RunConfig, world: World, *, command: str = "", floor: bool = True
) -> dict[str, Any]:
    """A whole run: train (or not), test, write the record. Returns the record's ``measured``.

    Without ``floor`` trained features are not tested beside it: a sweep does so once for all.
    Several processes part after the training: the main one tests alone, and nobody waits for it.
    """
    if config.fill_knowledge:
        return _fill(config, world)
    alone = config.test_only  # nothing of a run that is there is compared or changed
    with open_run(
        config.folder,
        config.stored,
        keys=OWN_KEYS,
        start="continue" if alone and config.start == "new" else config.start,
        may_differ=tuple(config.stored) if alone else MAY_DIFFER,
        usual={"threads": torch.get_num_threads()},
        world=world,
        main_writes=main_writes,
    ) as opened:
        torch.set_num_threads(opened.config["threads"])
        if opened.resumed and not alone:
            done = main_writes(lambda: _finished(opened.folder), world)
            if done is not None:
                opened.log.say(f"{opened.folder}: finished before")
                return done
        return _run(config, opened, world, command, floor)


def _finished(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    return dict(read_result(path)["measured"]) if path.exists() else None


def _run(
    config: RunConfig, opened: OpenRun, world: World, command: str, floor: bool
) -> dict[str, Any]:
    folder = opened.folder
    data = main_works(lambda: prepare_landmarks(config.data, folder), world)
    if data.rehearsal:
        opened.log.say(_rehearsal(config))
    for note in data.untested:
        opened.log.say(note)
    measured: dict[str, Any] = {}
    best = Path(config.train.init)
    if not config.test_only:
        trainer = Trainer(config, folder, data, world)
        measured["training"] = trainer.train()
        measured["parameters"] = sum(p.numel() for p in trainer.model.encoder.parameters())
        measured |= {**trainer.notes, "start": trainer.start.facts}
        if trainer.teacher is not None:
            measured["teacher_start"] = trainer.teacher.start
        best = folder / BEST
        barrier(world)  # the last one that all take part in
    if not world.is_main:
        return measured
    measured |= _test(config, folder, data, best, world)
    judged = _hold_to_floor(config, data, measured, world) if floor else ""
    if judged:
        Record(folder).write(judged)
    write_result(
        folder / RESULT,
        task=f"landmark_distill/{config.data.name.lower()}",
        command=command,
        scale="rehearsal" if data.rehearsal else "full",
        data=data.facts(config.network.image_size),
        seeds=[config.train.seed],
        measured=measured,
        started=opened.started,
        wall_seconds=opened.seconds,
    )
    if data.rehearsal:
        below = f" The student is {judged}." if judged.startswith("BELOW") else ""
        opened.log.say(_rehearsal(config) + below)
    return measured


def _rehearsal(config: RunConfig) -> str:
    return (
        f"REHEARSAL - built-in scenes, {config.network.image_size} px; {config.data.name} was not "
        "used. This is not a reproduction of any published number."
    )


def _fill(config: RunConfig, world: World) -> dict[str, Any]:
    """``--fill_knowledge``: every view's teacher outputs, and no training."""
    if world.world_size > 1:
        raise UsageError("--fill_knowledge writes one store: expected one process")
    with RunLock(config.folder):
        data = prepare_landmarks(config.data, config.folder)
        trainer = Trainer(config, config.folder, data, world)
        seen = config.views
        views = seen.views or (config.train.schedule.max_epoch if seen.augment else 1)
        loader = make_train_loader(config, data.train, world)
        asked = fill_store(trainer.source, loader, views=views)
    print(f"stored {asked} views in {config.distill.store}, {views} an image")
    return {"stored_views": asked, "views": views}


def _test(
    config: RunConfig, folder: Path, data: LandmarkData, best: Path, world: World
) -> dict[str, Any]:
    """The open-set test of a model file; its line goes to ``record.txt``.

    Embeds the test images in their order, as the file says that its network sees them, and
    verifies all pairs. Writes ``opensetFeat.npy`` and ``openset.json``.
    """
    weights, stored = read_model(best)
    check_channels(best, stored, bgr=config.views.bgr)
    network = config.network if stored is None else stored["network"]
    model = build(network, num_classes=None)
    load_weights(model.encoder, weights, source=str(best))
    facts = asked_facts(config.network, config.views) if stored is None else file_facts(stored)
    sum_ = {"checkpoint_sha256": weights_sha256(model.encoder.state_dict())}
    amp = config.train.amp
    precision = Precision(world.device, "fp32" if amp == AUTO else amp)  # auto is of training
    found = extract_features(
        embedder_of(model.encoder, facts.replaced(provenance=sum_), precision, name=str(best)),
        data.test,
        folder / FEATURE_FILE,
        batch_size=max(config.train.batch_size, 16),
        threads=config.data.threads,
    )
    result: OpenSetResult = openset_test(load_features(found.path), data.truths)
    write_results(folder, result, more={"features": FEATURE_FILE, "images": len(data.test)})
    Record(folder).write(result.line())
    return {"open_set": result.as_dict(), **fine_numbers(result)}


def _hold_to_floor(
    config: RunConfig, data: LandmarkData, measured: dict[str, Any], world: World
) -> str:
    """Test plain trained features on the same images, into ``measured``; the line that compares."""
    floor = trained_features(
        data.test,
        data.truths,
        pixels=config.network.image_size,
        device=world.device,
        threads=config.data.threads,
    )
    if isinstance(floor, str):
        return floor
    measured["trained_features"] = floor.facts()
    return verdict(measured, floor)
