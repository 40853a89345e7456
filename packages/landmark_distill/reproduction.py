"""The steps of a reproduction: split, floor, teacher, students by seed, comparison, report."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from landmark_distill import config
from landmark_distill.features import FEATURE_FILE, load_features
from landmark_distill.landmark_data import LandmarkData, prepare_landmarks
from landmark_distill.landmark_scenes import make_landmark_scenes
from landmark_distill.openset import OpenSetResult, openset_test
from landmark_distill.repro_report import write_report
from landmark_distill.repro_settings import ARMS, SETTINGS, Setting
from landmark_distill.session import run
from landmark_distill.utils import BEST, run_folder
from shared_core.datasets import decode
from shared_core.for_torch.distributed import World, start
from shared_core.metrics import paired_difference, summarize
from shared_core.metrics.floor import plain_features
from shared_core.runs import RunFolder, StageLog, write_result
from shared_core.runs.folder import remove_run
from shared_core.runs.progress import format_seconds

KEYS = ("recipe", "split_seed", "test_part", "seeds")
FARS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the comparison; small sets have no pairs for smaller ones
METRICS = ("vr_0.01", "vr_0.001", "recall_at_1", "map_at_r", "coarse_vr_0.01")
NOT_REPRODUCED = "rehearsal on drawn scenes: this is not a reproduction of any published number"


def headline(args: argparse.Namespace, data: LandmarkData, pixels: int) -> str:
    """The line that says what was run on what; the first and the last."""
    facts = data.facts(pixels)
    what = (
        f"landmark_distill {args.recipe}, scale {args.scale}: {facts['name']} ({facts['kind']}), "
        f"{facts['images']} images, {facts['classes']} classes learned, {pixels} px, "
        f"split {data.split_hash[:12]}"
    )
    if data.rehearsal:
        return f"REHEARSAL - {what}. {NOT_REPRODUCED[0].upper()}{NOT_REPRODUCED[1:]}."
    return f"{what}. The published images are not public; this is another set."


class Reproduction:
    """One recipe at one scale in one folder.

    Args:
        args: of ``reproduce.py``.
        command: as the user typed it.
    """

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.command = args, command
        self.setting: Setting = SETTINGS[args.recipe, args.scale]
        self.started = datetime.now(timezone.utc)
        if args.fresh:
            remove_run(args.output, keys=KEYS)
        stored = {
            "recipe": args.recipe,
            "scale": args.scale,
            "seeds": args.seeds,
            "split_seed": args.split_seed,
            "test_part": args.test_part,
            "teacher": str(args.teacher) if args.teacher else None,
            "data": None if args.data is None else args.data.resolve().name,
            "setting": repr(self.setting),
        }
        self.folder = RunFolder.create(args.output, stored, resume=args.go_on).path
        self.log = StageLog(self.folder)
        threads = self.setting.threads if args.threads is None else args.threads
        if threads:
            torch.set_num_threads(threads)
        self.world: World = start(device=args.device)
        self.split = self.folder / "split.json"
        self.root = args.data or make_landmark_scenes(
            self.folder / "data" / "scenes", **(self.setting.scenes or {})
        )

    # -- the options of each run ------------------------------------------------------------------

    def words(self, *more: str, teacher: bool = False, name: str) -> list[str]:
        """The command line of one run of ``main.py``."""
        own = self.setting.teacher if teacher else self.setting.student
        return [
            *("--data_path", str(self.root), "--dataset", self.root.name),
            *("--test_part", self.args.test_part, "--save_dir", str(self.folder / "runs" / name)),
            *("--resume", "auto", "--device", self.args.device, "--view_seed", "0"),
            *self.setting.common,
            *own,
            *more,
        ]

    def split_words(self) -> list[str]:
        """Who decides what is learned: a split that is there, or shares."""
        if self.split.exists():
            return ["--split_file", str(self.split)]
        return [
            *("--split_seed", str(self.args.split_seed)),
            *("--test_share", "0.25", "--validation_share", "0.15"),
        ]

    def options(self, words: Sequence[str]) -> argparse.Namespace:
        """Parsed, as ``main.py`` does it."""
        return config.parse([*words, *self.split_words()], prog="main.py")

    # -- the steps --------------------------------------------------------------------------------

    def prepare(self) -> LandmarkData:
        """The split, written once; every run reads it."""
        args = self.options(self.words("--seed", "0", teacher=True, name="teacher"))
        self.pixels = args.image_size
        return prepare_landmarks(args, self.folder)

    def one(self, stage: str, words: Sequence[str]) -> dict[str, Any]:
        """One training run, or what it left behind. Returns its folder and what it measured."""
        done = self.log.done(stage)
        if done is not None:
            self.log.say(f"{stage}: done before")
            return done
        args = self.options(words)
        self.log.say(f"--- {stage}")
        begun = time.monotonic()
        command = shlex.join(["packages/landmark_distill/main.py", *words, *self.split_words()])
        measured = run(args, self.world, command=command)
        training = measured["training"]
        result = {
            "folder": run_folder(args).relative_to(self.folder).as_posix(),
            "parameters": measured["parameters"],
            "calibration_accuracy": training["max_acc"],
            "best_epoch": training["best_epoch"],
            "seconds": training["seconds"],
        }
        self.log.write(stage, "val", training["best_epoch"], {"acc": training["max_acc"]})
        self.log.say(f"{stage}: {format_seconds(time.monotonic() - begun)}")
        return self.log.finish(stage, result)

    def teacher(self) -> Path:
        """The teacher's file: the user's, or of a run."""
        if self.args.teacher is not None:
            return Path(self.args.teacher)
        done = self.one("teacher", self.words("--seed", "0", teacher=True, name="teacher"))
        return self.folder / done["folder"] / BEST

    def student(self, arm: str, seed: int, teacher: Path, backbone: str) -> dict[str, Any]:
        """One student; those that are distilled share the stored teacher features."""
        more = ["--seed", str(seed), *ARMS[arm][1]]
        if arm != "none":
            more += [
                *("--teacher_backbone_class", backbone, "--teacher_init_weights", str(teacher)),
                *("--knowledge", str(self.folder / "knowledge"), *self.setting.distilled),
            ]
        return self.one(f"{arm}-{seed}", self.words(*more, name=f"{arm}-{seed}"))

    def floor(self, data: LandmarkData) -> OpenSetResult:
        """Plain image features in the place of a network's."""
        paths = data.test.paths or []
        rows = np.stack([plain_features(decode(path)) for path in paths])
        return openset_test(rows - rows.mean(axis=0), truths(data), far_targets=FARS, curve=True)


def truths(data: LandmarkData) -> dict[str, Any]:
    """What belongs together among the test images."""
    return {"coarse": data.coarse, "fine": data.fine}


def numbers(result: OpenSetResult) -> dict[str, float]:
    """The numbers that arms are compared by; fractions."""
    fine, coarse = result.rates["fine"], result.rates["coarse"]
    row = {f"vr_{far:g}": fine[i] for i, far in enumerate(FARS)}
    row |= {f"coarse_vr_{far:g}": coarse[i] for i, far in enumerate(FARS)}
    found = result.retrieval["fine"]
    row["recall_at_1"] = found.recall[1]
    row["map_at_r"] = found.mean_average_precision_at_r
    return row


def compare(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Mean and deviation of each arm, and the first arm against each other, paired by seed."""
    summary: dict[str, Any] = {}
    for arm, runs in rows.items():
        summary[arm] = {}
        for name in runs[0]:
            one = summarize([row[name] for row in runs])
            summary[arm][name] = {"mean": one.mean, "std": one.std, "n": one.n}
    first = next(iter(rows))
    paired: dict[str, Any] = {}
    for arm in list(rows)[1:]:
        paired[f"{first} - {arm}"] = {}
        for name in rows[first][0]:
            gap = paired_difference([r[name] for r in rows[first]], [r[name] for r in rows[arm]])
            paired[f"{first} - {arm}"][name] = {
                "mean": gap.mean,
                "std": gap.std,
                "low": gap.low,
                "high": gap.high,
                "wins": gap.wins,
                "n": gap.n,
            }
    return {"arms": summary, "paired": paired}


def reproduce(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Run every step that is not done yet, then compare and write the report."""
    command = shlex.join(["packages/landmark_distill/reproduce.py", *words])
    work = Reproduction(args, command)
    data = work.prepare()
    first = headline(args, data, work.pixels)
    work.log.say(first)
    begun = time.monotonic()
    teacher = work.teacher()
    options = work.options(work.words(teacher=True, name="teacher"))
    folders: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm in ARMS:
            folders[arm].append(work.student(arm, seed, teacher, options.backbone_class))
    results = {
        arm: [_measured(work.folder / one["folder"], data) for one in runs]
        for arm, runs in folders.items()
    }
    floor = work.floor(data)
    rows = {arm: [numbers(result) for result in runs] for arm, runs in results.items()}
    measured: dict[str, Any] = {
        "floor": numbers(floor),
        **compare(rows),
        "runs": {
            arm: [{**one, **row} for one, row in zip(folders[arm], rows[arm], strict=True)]
            for arm in ARMS
        },
        "hold_out": list(data.notes),
    }
    drawn: dict[str, OpenSetResult] = {"plain features": floor}
    if args.teacher is None:
        done = work.log.done("teacher") or {}
        result = _measured(work.folder / done["folder"], data)
        measured["teacher"] = {**done, **numbers(result)}
        drawn["teacher"] = result
    drawn |= {f"student, {arm}": runs[0] for arm, runs in results.items()}
    seconds = sum(one.get("seconds", 0.0) for one in work.log.stages.values())
    record = write_result(
        work.folder / "result.json",
        task=f"landmark_distill/{args.recipe}",
        command=command,
        scale=args.scale,
        data=data.facts(work.pixels),
        seeds=args.seeds,
        measured=measured,
        started=work.started,
        wall_seconds=max(seconds, time.monotonic() - begun),
    )
    sheet = work.folder / folders["fixed"][0]["folder"] / FEATURE_FILE
    write_report(work, record, data, drawn, load_features(sheet), title=first)
    _say(work, measured)
    work.log.say(first)
    return measured


def _measured(folder: Path, data: LandmarkData) -> OpenSetResult:
    """The open-set test of the features that a run left."""
    features = load_features(folder / FEATURE_FILE)
    return openset_test(features, truths(data), far_targets=FARS, curve=True)


def _say(work: Reproduction, measured: dict[str, Any]) -> None:
    for arm in ARMS:
        row = measured["arms"][arm]
        work.log.say(
            f"{arm:>6}: "
            + ", ".join(f"{n} {row[n]['mean']:.4f} +- {row[n]['std']:.4f}" for n in METRICS)
        )
    for name, row in measured["paired"].items():
        work.log.say(f"{name}: " + ", ".join(f"{n} {row[n]['mean']:+.4f}" for n in METRICS))
    work.log.say(f"report: {work.folder / 'report.html'}")
