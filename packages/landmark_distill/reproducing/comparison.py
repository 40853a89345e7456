"""A reproduction as a sweep: a teacher, then students of three kinds by seed, each a cell."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from landmark_distill.config import RunConfig
from landmark_distill.gallery.features import FEATURE_FILE, load_features
from landmark_distill.images.landmark_data import SPLIT_FILE, LandmarkData, prepare_landmarks
from landmark_distill.images.landmark_scenes import make_landmark_scenes
from landmark_distill.judging.judge import OpenSetResult, openset_test
from landmark_distill.judging.trained_features import TrainedFeatures, trained_features
from landmark_distill.parsing import parse
from landmark_distill.reproducing.report_page import verdicts, write_report
from landmark_distill.reproducing.settings import ARMS, SETTINGS, TEACHER, Setting
from landmark_distill.session import run as run_main
from landmark_distill.utils import BEST
from shared_core.datasets import decode
from shared_core.for_torch.distributed import start as start_world
from shared_core.metrics.floor import plain_features
from shared_core.runs import OpenRun, RunLock, open_run, read_metrics, write_result
from shared_core.runs.place import Start
from shared_core.trials import Cell, Difference, Trials, compare, run_cell, run_trials, spread

KEYS = ("recipe", "split_seed", "test_part", "setting")
FARS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the comparison; small sets have no pairs for smaller ones
NOT_REPRODUCED = "This is not a reproduction of any published number."


@dataclass(frozen=True)
class Asked:
    """What ``reproduce.py`` was told.

    Attributes:
        images: folder of images; None draws scenes.
        teacher: file of a trained teacher; None trains one.
        threads: of the CPU; None for the scale's.
        command: as the user typed it.
    """

    recipe: str
    scale: str
    images: Path | None
    output: Path
    teacher: Path | None
    seeds: tuple[int, ...]
    split_seed: int
    test_part: str
    threads: int | None
    device: str
    start: Start
    shard: tuple[int, int]
    merge: tuple[Path, ...]
    command: str


def reproduce(asked: Asked) -> dict[str, Any] | None:
    """Do what is left of the sweep; when nothing is, write record and report.

    Returns:
        The record's ``measured``, or None while other processes have cells to do.
    """
    setting = SETTINGS[asked.recipe, asked.scale]
    config = {
        "recipe": asked.recipe,
        "scale": asked.scale,
        "split_seed": asked.split_seed,
        "test_part": asked.test_part,
        "teacher": asked.teacher,
        "data": None if asked.images is None else asked.images.resolve().name,
        "setting": asdict(setting),
    }
    with open_run(asked.output, config, keys=KEYS, start=asked.start, shared=True) as opened:
        threads = setting.threads if asked.threads is None else asked.threads
        if threads:
            torch.set_num_threads(threads)
        with opened.one_at_a_time():
            bench = Bench(asked, setting, opened.folder)
        opened.log.say(bench.headline)
        trials = run_trials(
            bench.cells(),
            bench.measure,
            folder=opened.folder,
            shard=asked.shard,
            merge=asked.merge,
            show="vr_0.01",
            say=opened.log.say,
        )
        if trials.missing:
            opened.log.say(trials.missing_text)
            return None
        measured = _conclude(bench, opened, trials)
        opened.log.say(" ".join([bench.headline, *measured["verdicts"]]))
    return measured


class Bench:
    """The cells of a sweep, and how each is trained and measured.

    Args:
        asked: what the command was told.
        setting: of its recipe and scale.
        folder: of the sweep; split, drawn scenes and stored teacher features lie there for all.
    """

    def __init__(self, asked: Asked, setting: Setting, folder: Path) -> None:
        self.asked, self.setting, self.folder = asked, setting, folder
        self.world = start_world(device=asked.device)
        self.root = asked.images or make_landmark_scenes(folder / "data" / "scenes", setting.drawn)
        words = self._words(setting.teacher, "0", folder / "unused")
        config = parse(words, prog="main.py")
        self.pixels, self.teacher_backbone = config.network.image_size, config.network.name
        self.data: LandmarkData = prepare_landmarks(config.data, folder)

    @property
    def headline(self) -> str:
        """The line that says what was run on what; the first and the last."""
        facts = self.data.facts(self.pixels)
        what = (
            f"landmark_distill {self.asked.recipe}, scale {self.asked.scale}: {facts['name']} "
            f"({facts['kind']}), {facts['images']} images, {facts['classes']} classes learned, "
            f"{self.pixels} px, split {self.data.split_hash[:12]}"
        )
        if self.data.rehearsal:
            return f"REHEARSAL - {what}. {NOT_REPRODUCED}"
        return f"{what}. The published images are not public; this is another set."

    # -- what there is to do ----------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """The teacher, if none was given, and for each seed a student of each kind."""
        students = [self._cell(arm, seed) for seed in self.asked.seeds for arm in self.setting.arms]
        return students if self.asked.teacher else [self._cell(TEACHER, 0), *students]

    def _cell(self, name: str, seed: int) -> Cell:
        settings = {
            "options": [*self.setting.common, *self._own(name)],
            "split": self.data.split_hash,
            "test_part": self.asked.test_part,
            "teacher": self.asked.teacher if name != "none" else None,
        }
        return Cell(name, settings, seed)

    def _own(self, name: str) -> tuple[str, ...]:
        """Options that a cell does not share with all others."""
        if name == TEACHER:
            return self.setting.teacher
        taught = self.setting.distilled if name != "none" else ()
        return (*self.setting.student, *ARMS[name].options, *taught)

    def _words(self, own: Sequence[str], seed: str, output: Path) -> list[str]:
        """The command line of one run of ``main.py``."""
        return [
            *("--data-path", str(self.root), "--dataset", self.root.name, "--output", str(output)),
            *("--test_part", self.asked.test_part, "--continue", "--device", self.asked.device),
            *("--seed", seed, "--view_seed", "0", *self._split(), *self.setting.common, *own),
        ]

    def _split(self) -> list[str]:
        """Who decides what is learned: a split that is there, or shares."""
        split = self.folder / SPLIT_FILE
        if split.exists():
            return ["--split", str(split)]
        return [
            *("--split_seed", str(self.asked.split_seed)),
            *("--test_share", "0.25", "--validation_share", "0.15"),
        ]

    def _taught(self) -> list[str]:
        """The options that name a teacher and its stored features, which all seeds share."""
        return [
            *("--teacher_backbone_class", self.teacher_backbone),
            *("--teacher_init_weights", str(self._teacher_file())),
            *("--knowledge", str(self.folder / "knowledge")),
        ]

    def _teacher_file(self) -> Path:
        """The user's, or of the teacher's cell, which the first process that needs it trains."""
        if self.asked.teacher is not None:
            return self.asked.teacher
        done = run_cell(self._cell(TEACHER, 0), self.measure, folder=self.folder) or {}
        file = self.folder / done["result"]["folder"] / BEST
        if not file.exists():
            raise FileNotFoundError(
                f"{file}: the teacher was trained elsewhere, expected its folder or --teacher FILE"
            )
        return file

    # -- one cell ---------------------------------------------------------------------------------

    def measure(self, cell: Cell, place: Path) -> dict[str, Any]:
        """Train one network and test it among classes that it has not seen."""
        own = [*self._own(cell.name)]
        if cell.name not in (TEACHER, "none"):
            own += self._taught()
            self._fill(own, place)
        words = self._words(own, str(cell.seed), place)
        command = shlex.join(["packages/landmark_distill/main.py", *words])
        found = run_main(self._parsed(words), self.world, command=command, floor=False)
        result = self._judged(place)
        lines = read_metrics(place / "metrics.jsonl")
        return {
            "folder": place.relative_to(self.folder).as_posix(),
            "parameters": found["parameters"],
            "start": found["start"],
            "calibration_accuracy": found["training"]["max_acc"],
            "best_epoch": found["training"]["best_epoch"],
            "seconds": found["training"]["seconds"],
            **numbers(result),
            "curve": curve(result),
            "learning": [[one["step"], one["acc"]] for one in lines if one["split"] == "val"],
        }

    def _fill(self, own: Sequence[str], place: Path) -> None:
        """The teacher's features of all views, stored by the first student that wants them."""
        with RunLock(self.folder / "knowledge", wait=math.inf):
            note = self.folder / "knowledge" / "filled.json"
            if note.exists():
                return
            words = [*self._words(own, "0", place), "--fill_knowledge"]
            stored = run_main(self._parsed(words), self.world)
            note.write_text(json.dumps(stored) + "\n", encoding="utf-8")

    def _parsed(self, words: Sequence[str]) -> RunConfig:
        return parse(words, prog="main.py")

    def _judged(self, place: Path) -> OpenSetResult:
        features = load_features(place / FEATURE_FILE)
        return openset_test(features, self.data.truths, far_targets=FARS, curve=True)

    def trained_floor(self) -> TrainedFeatures | str:
        """Trained features as they are, or a line that says why there are none."""
        data = self.data
        return trained_features(
            data.test, data.truths, pixels=self.pixels, device=self.world.device
        )

    def floor(self) -> OpenSetResult:
        """Plain image features in the place of a network's."""
        paths = [Path(path) for path in self.data.test.paths or []]
        rows = np.stack([plain_features(decode(path)) for path in paths])
        rows = rows - rows.mean(axis=0)
        return openset_test(rows, self.data.truths, far_targets=FARS, curve=True)


def numbers(result: OpenSetResult) -> dict[str, float | None]:
    """What arms are compared by: fractions; None where too few pairs can show nothing."""
    row: dict[str, float | None] = {}
    for truth, prefix in (("fine", ""), ("coarse", "coarse_")):
        if truth not in result.rates:
            continue
        pairs = zip(FARS, result.rates[truth], result.measurable[truth], strict=True)
        row |= {f"{prefix}vr_{far:g}": rate if enough else None for far, rate, enough in pairs}
    found = result.retrieval["fine"]
    row["recall_at_1"] = found.recall[1]
    row["map_at_r"] = found.mean_average_precision_at_r
    return row


def curve(result: OpenSetResult) -> dict[str, Any]:
    """The fine ROC as plain JSON: targets, rates, reached FAR, impostor pairs."""
    one = result.curves["fine"]
    return {
        "far_targets": list(one.far_targets),
        "rates": one.rates.tolist(),
        "far": one.far.tolist(),
        "impostor": one.impostor,
    }


def differences(
    trials: Trials, names: Sequence[str], arms: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """The first kind of student against each other one, paired by seed: name, number."""
    first, *others = arms
    found = {}
    for other in others:
        gaps = {name: compare(trials, first, other, name) for name in names}
        found[f"{first} - {other}"] = gaps
    return found


def _conclude(bench: Bench, opened: OpenRun, trials: Trials) -> dict[str, Any]:
    """Compare, and write the record and the report."""
    asked, floor = bench.asked, bench.floor()
    shown = [name for name, value in numbers(floor).items() if value is not None]
    arms = bench.setting.arms
    paired = differences(trials, shown, arms)
    measured: dict[str, Any] = {
        "floor": numbers(floor),
        "arms": {arm: {n: spread(trials.values(arm, n)) for n in shown} for arm in arms},
        "paired": {
            pair: {name: gap.plain() for name, gap in gaps.items()} for pair, gaps in paired.items()
        },
        "runs": {arm: [_row(one) for one in trials.rows(arm, asked.seeds)] for arm in arms},
        "hold_out": list(bench.data.notes),
    }
    trained = bench.trained_floor()
    if not isinstance(trained, str):
        measured["trained_features"] = trained.facts()
    measured["verdicts"] = [trained] if isinstance(trained, str) else []
    measured["verdicts"] += verdicts(measured, arms[0])
    if asked.teacher is None:
        measured["teacher"] = _row(trials.results[TEACHER, 0])
    record = write_result(
        opened.folder / "result.json",
        task=f"landmark_distill/{asked.recipe}",
        command=asked.command,
        scale=asked.scale,
        data=bench.data.facts(bench.pixels),
        seeds=list(asked.seeds),
        measured=measured,
        started=opened.started,
        wall_seconds=trials.seconds,
    )
    write_report(opened.folder, record, bench.data, trials, paired, curve(floor), bench.headline)
    opened.log.say(f"report: {opened.folder / 'report.html'}")
    return measured


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's result without what only the report draws."""
    return {key: value for key, value in result.items() if key not in ("curve", "learning")}
